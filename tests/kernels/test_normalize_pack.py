"""The native normalise-and-pack against fp64, against plain PyTorch, and under torch.compile."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaeva.ops import native_devices
from megaeva.ops.normalize_pack import EPSILON, normalize_pack, reference

native = pytest.mark.skipif("cpu" not in native_devices(), reason="the extension is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _forward_backward(
    function: Callable[[Tensor, Tensor], Tensor], image_BE: Tensor, text_BE: Tensor, grad_2BE: Tensor
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (image_BE, text_BE)]
    packed_2BE = function(*leaves)
    return [packed_2BE.detach(), *torch.autograd.grad(packed_2BE, leaves, grad_2BE)]


def test_the_extension_is_built_where_a_compiler_is() -> None:
    # Without this, a broken build would turn every test below into a skip.
    if shutil.which("g++") is None:
        pytest.skip("no g++: the reference is what runs here")
    assert "cpu" in native_devices(), "build it: pip install -e . --no-build-isolation --no-deps"


@native
@pytest.mark.parametrize("width", [2, 7, 96, 768, 1024, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_fp64_is_at_most_twice_plain_pytorch(dtype: torch.dtype, width: int) -> None:
    image_BE, text_BE, grad_2BE = _draw(0, 129, width), _draw(1, 129, width), _draw(2, 258, width)
    image_BE, text_BE, grad_2BE = image_BE.to(dtype), text_BE.to(dtype), grad_2BE.to(dtype)
    exact = _forward_backward(reference, image_BE.double(), text_BE.double(), grad_2BE.double())
    ours = _forward_backward(normalize_pack, image_BE, text_BE, grad_2BE)
    plain = _forward_backward(reference, image_BE, text_BE, grad_2BE)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        error, plain_error = ((x.double() - true).norm() / true.norm() for x in (mine, theirs))
        assert plain_error > 0  # the comparison means something
        assert error <= 2 * plain_error


@native
def test_gradient_is_the_derivative() -> None:
    image_BE, text_BE = (_draw(seed, 3, 5, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(normalize_pack, (image_BE, text_BE))
    assert torch.autograd.gradcheck(normalize_pack, (image_BE,))


@native
@pytest.mark.parametrize("with_text", [True, False], ids=["pair", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_contract(dtype: torch.dtype, with_text: bool) -> None:
    image_BE = _draw(0, 4, 6, dtype=dtype).requires_grad_()
    text_BE = _draw(1, 4, 6, dtype=dtype).requires_grad_() if with_text else None
    torch.library.opcheck(torch.ops.megaeva.normalize_pack.default, (image_BE, text_BE, EPSILON))
    detached = [None if x is None else x.detach() for x in (image_BE, text_BE)]
    packed, inverse_norm = torch.ops.megaeva.normalize_pack(*detached, EPSILON)
    backward_arguments = (packed, *detached, inverse_norm, EPSILON)
    torch.library.opcheck(torch.ops.megaeva.normalize_pack_backward.default, backward_arguments)


@pytest.mark.parametrize("function", [pytest.param(normalize_pack, marks=native), reference])
def test_one_modality_alone_is_the_first_half_of_a_pair(function: Callable[..., Tensor]) -> None:
    wide_BE, text_BE, grad_2BE = _draw(0, 5, 20), _draw(1, 5, 7), _draw(2, 10, 7)
    for image_BE in (wide_BE[:, 3:10], wide_BE[:0, :7]):
        num_rows = len(image_BE)
        pair = _forward_backward(function, image_BE, text_BE[:num_rows], grad_2BE[: 2 * num_rows])
        leaf = image_BE.detach().clone().requires_grad_()
        packed_BE = function(leaf)
        (grad_BE,) = torch.autograd.grad(packed_BE, leaf, grad_2BE[:num_rows])
        assert packed_BE.shape == image_BE.shape
        assert torch.equal(packed_BE, pair[0][:num_rows])
        assert torch.equal(grad_BE, pair[1])


@pytest.mark.parametrize("function", [pytest.param(normalize_pack, marks=native), reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_epsilon_as_in_torch_normalize(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    tiny = torch.tensor([[0.0, 0.0], [3e-16, 4e-16], [3e-3, 4e-3]], dtype=dtype)
    grad_2BE = _draw(0, 6, 2, dtype=dtype)
    mine = _forward_backward(function, tiny, tiny.flip(0), grad_2BE)
    leaf = torch.cat([tiny, tiny.flip(0)]).requires_grad_()
    true_2BE = torch.nn.functional.normalize(leaf, dim=-1)
    (true_grad_2BE,) = torch.autograd.grad(true_2BE, leaf, grad_2BE)
    torch.testing.assert_close(mine[0], true_2BE.detach())
    # What cancels in g - x <g, x> sets the scale of the rounding error of a row.
    scale_2B1 = grad_2BE.norm(dim=-1, keepdim=True) / leaf.detach().norm(dim=-1, keepdim=True).clamp_min(EPSILON)
    error_2BE = (torch.cat(mine[1:]) - true_grad_2BE) / scale_2B1
    assert error_2BE.abs().max() <= 8 * torch.finfo(dtype).eps


@native
def test_rows_of_nan_and_infinity_do_not_touch_their_neighbours() -> None:
    image_BE, text_BE = _draw(0, 3, 8), _draw(1, 3, 8)
    image_BE[1, 2] = float("nan")
    packed_2BE = normalize_pack(image_BE, text_BE)
    assert packed_2BE[1].isnan().all()
    assert packed_2BE[[0, 2, 3, 4, 5]].isfinite().all()


@native
def test_strided_rows_and_empty_batches() -> None:
    wide_BE = _draw(0, 6, 20)
    for image_BE, text_BE in [
        (wide_BE[:, 3:10], wide_BE[:, 10:17]),  # rows apart
        (wide_BE[::2, ::2], wide_BE[1::2, 1::2]),  # elements apart: copied inside
        (wide_BE[:1].expand(6, 20), wide_BE),  # stride 0
        (wide_BE[:0], wide_BE[:0]),
        (wide_BE[:, :0], wide_BE[:, :0]),
    ]:
        torch.testing.assert_close(normalize_pack(image_BE, text_BE), reference(image_BE, text_BE))
    image_BE, text_BE = wide_BE[:, 3:10], wide_BE[:, 10:17]
    grad_2BE = _draw(1, 12, 14)[:, ::2]
    mine, theirs = (_forward_backward(f, image_BE, text_BE, grad_2BE) for f in (normalize_pack, reference))
    torch.testing.assert_close(mine, theirs)
    expanded = torch.ones(()).expand(12, 7)  # what .sum().backward() hands over
    mine, theirs = (_forward_backward(f, image_BE, text_BE, expanded) for f in (normalize_pack, reference))
    torch.testing.assert_close(mine, theirs)


@native
def test_threads_do_not_change_a_bit() -> None:
    image_BE, text_BE = _draw(0, 700, 512), _draw(1, 700, 512)
    threads_before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(normalize_pack(image_BE, text_BE))
    finally:
        torch.set_num_threads(threads_before)
    assert torch.equal(*results)


@native
def test_only_one_side_needs_a_gradient() -> None:
    image_BE, text_BE = _draw(0, 3, 8).requires_grad_(), _draw(1, 3, 8)
    normalize_pack(image_BE, text_BE).square().mul(_draw(2, 6, 8)).sum().backward()
    assert image_BE.grad is not None and image_BE.grad.isfinite().all()
    assert text_BE.grad is None
    assert not normalize_pack(text_BE, text_BE).requires_grad


@native
@pytest.mark.parametrize(
    ("image_BE", "text_BE", "expected"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), "one shape"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64), "must agree"),
        (torch.ones(6), torch.ones(6), "must be a matrix"),
        (torch.ones(6), None, "must be a matrix"),
    ],
)
def test_mismatched_inputs_are_named(image_BE: Tensor, text_BE: Tensor | None, expected: str) -> None:
    with pytest.raises(RuntimeError, match=expected):
        normalize_pack(image_BE, text_BE)


@native
@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    weight_2BE = _draw(2, 8, 16)

    def loss(image_BE: Tensor, text_BE: Tensor) -> Tensor:
        packed_2BE = normalize_pack(image_BE * 2, text_BE + 1)
        packed_BE = normalize_pack(image_BE * 3)
        return packed_2BE.square().mul(weight_2BE).sum() + packed_BE.mul(weight_2BE[:4]).sum()

    compiled = torch.compile(loss, fullgraph=True)
    grads = []
    for function in (loss, compiled):
        leaves = [_draw(seed, 4, 16).requires_grad_() for seed in (0, 1)]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*grads)


def test_a_second_derivative_is_an_error() -> None:
    rows_BE = torch.randn(5, 4, requires_grad=True)
    (first,) = torch.autograd.grad(normalize_pack(rows_BE)[:, 0].sum(), rows_BE, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        first.sum().backward()
