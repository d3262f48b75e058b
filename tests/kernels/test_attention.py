"""The native attention against fp64, against plain PyTorch, and under torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.ops import native_devices
from megaeva.ops.attention import attention, reference

native = pytest.mark.skipif("cpu" not in native_devices("attention"), reason="the extension is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# length, batch, heads, head width: the last block of rows is full, has one row, or is the only one.
SIZES = [(5, 2, 2, 16), (16, 1, 2, 8), (17, 2, 3, 32), (64, 1, 1, 64), (65, 1, 2, 88), (197, 1, 2, 64), (77, 2, 1, 104)]


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _angles(length: int, batch: int, width: int) -> Tensor:
    """cos and sin of the same angle for neighbouring dims, another for each token."""
    angle = _draw(7, length, batch, 1, width // 2).repeat_interleave(2, -1) * 3
    return torch.stack([angle.cos(), angle.sin()])


def _forward_backward(function: Callable[..., Tensor], qkv_SBX: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    leaf = qkv_SBX.detach().clone().requires_grad_()
    out_SBD = function(leaf, **options)
    return [out_SBD.detach(), *torch.autograd.grad(out_SBD, leaf, grad)]


@native
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_fp64_is_at_most_twice_plain_pytorch(dtype: torch.dtype, size: Any, causal: bool) -> None:
    length, batch, heads, width = size
    qkv_SBX = _draw(0, length, batch, heads * 3 * width).to(dtype)
    grad_SBD = _draw(1, length, batch, heads * width).to(dtype)
    for angles in (None, _angles(length, 1, width), _angles(length, batch, width)):
        options = {"num_heads": heads, "cos_sin": angles, "causal": causal}
        exact = _forward_backward(reference, qkv_SBX.double(), grad_SBD.double(), **options)
        ours = _forward_backward(attention, qkv_SBX, grad_SBD, **options)
        plain = _forward_backward(reference, qkv_SBX, grad_SBD, **options)
        for mine, theirs, true in zip(ours, plain, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == true.shape and mine.is_contiguous()
            error, plain_error = ((x.double() - true).norm() / true.norm() for x in (mine, theirs))
            assert plain_error > 0  # the comparison means something
            assert error <= 2 * plain_error


@native
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_do_not_overflow(causal: bool) -> None:
    qkv_SBX, grad_SBD = 30 * _draw(0, 40, 2, 2 * 3 * 16), _draw(1, 40, 2, 32)
    options = {"num_heads": 2, "causal": causal}
    exact = _forward_backward(reference, qkv_SBX.double(), grad_SBD.double(), **options)
    ours, plain = (_forward_backward(f, qkv_SBX, grad_SBD, **options) for f in (attention, reference))
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


@native
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_is_the_derivative(causal: bool) -> None:
    qkv_SBX = _draw(0, 3, 2, 2 * 3 * 4, dtype=torch.float64).requires_grad_()
    angles = _angles(3, 1, 4)
    assert torch.autograd.gradcheck(lambda x: attention(x, 2, cos_sin=angles, causal=causal), qkv_SBX)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_contract(dtype: torch.dtype) -> None:
    qkv_SBX = _draw(0, 5, 2, 2 * 3 * 4, dtype=dtype)
    for angles, causal in [(None, True), (_angles(5, 2, 4).squeeze(3), False)]:
        torch.library.opcheck(torch.ops.megaeva.attention.default, (qkv_SBX.requires_grad_(), angles, 2, causal))
        out_SBD, lse_BAS = torch.ops.megaeva.attention(qkv_SBX.detach(), angles, 2, causal)
        arguments = (_draw(1, 5, 2, 8, dtype=dtype), qkv_SBX.detach(), angles, out_SBD, lse_BAS, 2, causal)
        torch.library.opcheck(torch.ops.megaeva.attention_backward.default, arguments)


@native
def test_a_causal_token_sees_nothing_behind_it() -> None:
    qkv_SBX = _draw(0, 70, 2, 3 * 8)
    clean_SBD = attention(qkv_SBX, 1, causal=True)
    qkv_SBX[66, 1] = 100.0
    out_SBD = attention(qkv_SBX, 1, causal=True)
    assert torch.equal(out_SBD[:66], clean_SBD[:66]) and torch.equal(out_SBD[:, 0], clean_SBD[:, 0])
    assert (out_SBD[66:, 1] != clean_SBD[66:, 1]).all()


@native
def test_nan_stays_in_its_sample_and_is_not_lost() -> None:
    qkv_SBX = _draw(0, 70, 2, 3 * 8)
    qkv_SBX[66, 1, 8] = float("nan")  # of a key
    out_SBD = attention(qkv_SBX, 1)
    assert out_SBD[:, 1].isnan().all() and out_SBD[:, 0].isfinite().all()


@native
def test_slices_expanded_gradients_and_nothing_at_all() -> None:
    wide_SBX = _draw(0, 9, 3, 60)
    for qkv_SBX in (
        wide_SBX[2:7],
        wide_SBX[:, 1:, 12:36],
        wide_SBX[::2, ::2, ::5],
        wide_SBX[:1],
        wide_SBX[:0],
        wide_SBX[:, :0],
    ):
        grad_SBD = torch.ones(()).expand(*qkv_SBX.shape[:2], qkv_SBX.shape[2] // 3)  # what .sum().backward() hands over
        mine, theirs = (_forward_backward(f, qkv_SBX, grad_SBD, num_heads=2) for f in (attention, reference))
        torch.testing.assert_close(mine, theirs)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    qkv_SBX, grad_SBD = _draw(0, 70, 3, 2 * 3 * 16, dtype=dtype), _draw(1, 70, 3, 32, dtype=dtype)
    threads_before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(_forward_backward(attention, qkv_SBX, grad_SBD, num_heads=2))
    finally:
        torch.set_num_threads(threads_before)
    assert all(map(torch.equal, *results))


@native
def test_odd_heads_run_the_reference() -> None:
    qkv_SBX = _draw(0, 5, 2, 2 * 3 * 3)
    assert torch.equal(attention(qkv_SBX, 2), reference(qkv_SBX, 2))
    with pytest.raises(RuntimeError, match="even head width"):
        torch.ops.megaeva.attention(qkv_SBX, None, 2, False)


@native
@pytest.mark.parametrize(
    ("heads", "angles", "expected"),
    [
        (5, None, "qkv_SBX"),
        (2, torch.ones(2, 4, 1, 4), "cos_sin"),
        (2, torch.ones(2, 3, 1, 2), "cos_sin"),
        (2, torch.ones(2, 3, 1, 4, dtype=torch.float64), "cos_sin"),
    ],
)
def test_mismatched_inputs_are_named(heads: int, angles: Tensor | None, expected: str) -> None:
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.megaeva.attention(torch.ones(3, 2, 24), angles, heads, False)


@native
@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    angles = _angles(6, 1, 4)

    def loss(qkv_SBX: Tensor) -> Tensor:
        return attention(qkv_SBX * 2, 2, cos_sin=angles).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = _draw(0, 6, 2, 24).requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf))
    torch.testing.assert_close(*grads)
