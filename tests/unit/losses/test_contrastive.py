"""The contrastive losses against the plain formulas, on one rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy, normalize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megaeva.losses import agreement, contrastive
from megaeva.losses.contrastive import clip_loss, sigmoid_loss
from megaeva.ops import contrastive as operators


def plain_loss(image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = log_scale.exp() * normalize(image_BE, dim=-1) @ normalize(text_BE, dim=-1).T
    labels = torch.arange(len(logits))
    by_image = cross_entropy(logits, labels, label_smoothing=smoothing)
    return (by_image + cross_entropy(logits.T, labels, label_smoothing=smoothing)) / 2


def pairs(num_pairs: int, dtype: torch.dtype) -> list[Tensor]:
    """Images, texts and the scale's logarithm, all with gradients."""
    generator = torch.Generator().manual_seed(num_pairs)
    values = [torch.randn(num_pairs, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [value.to(dtype).requires_grad_() for value in (*values, torch.tensor(0.7))]


def errors(num_pairs: int, seed: int, group: ProcessGroup) -> list[list[float]]:
    """Of the plain formula in fp32 and of ours: norms of what is off in the loss and in each gradient."""
    generator = torch.Generator().manual_seed(1000 * seed + num_pairs)
    values = [torch.randn(num_pairs, 24, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    values.append(torch.tensor(2.3, dtype=torch.float64))
    outcomes = []
    for loss, dtype in (
        (plain_loss, torch.float64),
        (plain_loss, torch.float32),
        (lambda *leaves: clip_loss(*leaves, group=group), torch.float32),
    ):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
        value = loss(*leaves)
        assert value.dtype == dtype
        outcomes.append([value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))])
    exact, *rough = outcomes
    return [[(mine - true).norm().item() for mine, true in zip(one, exact, strict=True)] for one in rough]


@pytest.mark.parametrize("num_pairs", [1, 7, 64, 100])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_error_is_that_of_the_plain_formula(num_pairs: int, implementation: str, monkeypatch, single_rank) -> None:
    if implementation == "reference":
        monkeypatch.setattr(operators, "_NATIVE_DEVICES", frozenset())
        monkeypatch.setattr(operators, "TILE", 32)  # 64: whole tiles; 7, 100: an uneven last one
    elif "cpu" not in operators._NATIVE_DEVICES:
        pytest.skip("the extension is not built")
    # Over draws: in a single one the plain formula's few roundings may cancel.
    plain, ours = torch.tensor([errors(num_pairs, seed, single_rank.groups.dp) for seed in range(12)]).norm(dim=0)
    assert (ours <= 2 * plain).all(), (ours, plain)


def test_large_unnormalised_inputs_at_scale_100_stay_finite(single_rank) -> None:
    image = (torch.randn(16, 8) * 1e4).requires_grad_()
    loss = clip_loss(image, image.detach(), torch.tensor(4.6052), group=single_rank.groups.dp)
    loss.backward()
    assert loss.item() < 1.0
    assert image.grad.isfinite().all()


def test_without_a_group_the_batch_is_this_process_alone(single_rank) -> None:
    image, text = torch.randn(5, 4), torch.randn(5, 4)
    alone = clip_loss(image, text, torch.tensor(1.0))
    assert torch.equal(alone, clip_loss(image, text, torch.tensor(1.0), group=single_rank.groups.dp))


def test_bf16_features_get_fp32_logits(single_rank) -> None:
    image, text = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    loss = clip_loss(image, text, torch.tensor(4.6), group=single_rank.groups.dp)
    exact = plain_loss(image.double(), text.double(), torch.tensor(4.6).double())
    # bf16 logits of size 100 would be off by up to 0.25; what is left here is rounding the normalised rows.
    assert abs(loss.item() - exact.item()) < 0.05


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_cross_entropys_and_gradients_are_exact(smoothing: float) -> None:
    leaves = pairs(7, torch.float64)
    torch.testing.assert_close(
        clip_loss(*leaves, label_smoothing=smoothing), plain_loss(*leaves, smoothing), rtol=1e-13, atol=1e-13
    )
    assert torch.autograd.gradcheck(lambda *leaves: clip_loss(*leaves, label_smoothing=smoothing), leaves)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, float("nan")])
def test_smoothing_outside_0_1_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"label_smoothing is {smoothing} on rank 0; it must lie in \[0, 1\)"):
        clip_loss(*pairs(2, torch.float32), label_smoothing=smoothing)


def test_sigmoid_loss_is_open_clips_and_gradients_are_exact() -> None:
    from open_clip.loss import SigLipLoss

    leaves = [*pairs(7, torch.float64), torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)]
    image, text, log_scale, bias = leaves
    theirs = SigLipLoss()(normalize(image, dim=-1), normalize(text, dim=-1), log_scale.exp(), bias)
    torch.testing.assert_close(sigmoid_loss(*leaves), theirs, rtol=1e-13, atol=1e-13)
    for ours, expected in zip(
        torch.autograd.grad(sigmoid_loss(*leaves), leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(sigmoid_loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_come_in_the_features_dtype_and_the_scales_in_its_own(dtype: torch.dtype) -> None:
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in pairs(9, torch.float64)[:2]]
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (2.0, -1.0))
    for loss in (clip_loss(*leaves, scale), sigmoid_loss(*leaves, scale, bias)):
        assert loss.dtype == torch.float32
        loss.backward()
    assert [leaf.grad.dtype for leaf in (*leaves, scale, bias)] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("loss", [clip_loss, sigmoid_loss])
def test_autocast_changes_nothing(
    loss: Callable[..., Tensor], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        monkeypatch.setattr(operators, "_NATIVE_DEVICES", frozenset())
    elif "cpu" not in operators._NATIVE_DEVICES:
        pytest.skip("the extension is not built")
    leaves = [*pairs(8, torch.float32)[:2], torch.tensor(4.6, requires_grad=True)]
    if loss is sigmoid_loss:
        leaves.append(torch.tensor(-1.5, requires_grad=True))
    plain = loss(*leaves)
    expected = [plain, *torch.autograd.grad(plain, leaves)]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*leaves)
        found = [value, *torch.autograd.grad(value, leaves)]
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", [clip_loss, sigmoid_loss])
def test_a_second_derivative_is_an_error(loss: Callable[..., Tensor]) -> None:
    image, text, log_scale = pairs(7, torch.float32)
    more = [torch.tensor(-1.5)] if loss is sigmoid_loss else []
    (first,) = torch.autograd.grad(loss(image, text, log_scale, *more), image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|differentiate twice"):
        first.pow(2).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [clip_loss, sigmoid_loss])
def test_compiles_without_a_graph_break(loss: Callable[..., Tensor]) -> None:
    leaves = pairs(7, torch.float32)
    if loss is sigmoid_loss:
        leaves.append(torch.tensor(-1.5, requires_grad=True))
    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, loss(*leaves))
    for ours, expected in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_no_copy_of_the_features_is_wider_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows are read in blocks: no float32 copy of a matrix, neither in the checks nor beside the operators."""
    monkeypatch.setattr(contrastive, "_BLOCK", 8)
    monkeypatch.setattr(agreement, "_BLOCK", 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    largest = max(largest, tensor.numel())
            return result

    if "cpu" not in operators._NATIVE_DEVICES:
        pytest.skip("the reference of the normalisation makes one")
    image, text = (torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with Watch():
        clip_loss(image, text, torch.tensor(2.0), label_smoothing=0.1).backward()
    assert largest <= 8 * 32


PLAIN, SCALE = torch.ones(3, 4), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((PLAIN, None, SCALE), "text_BE on rank 0 is not passed; it must be a matrix"),
        ((None, PLAIN, SCALE), "image_BE on rank 0 is not passed; it must be a matrix"),
        ((None, None, SCALE), "image_BE on rank 0 is not passed; it must be a matrix"),
        ((PLAIN, [[1.0]], SCALE), "text_BE on rank 0 is no tensor; it must be a matrix"),
        (
            (PLAIN, PLAIN, 1.0),
            "log_scale on rank 0 is no tensor; it must be a 0-dim floating tensor; pass torch.t",
        ),
        ((PLAIN, PLAIN, None), "log_scale on rank 0 is not passed; it must be a 0-dim floating tensor"),
        ((PLAIN, PLAIN, SCALE[None]), "log_scale on rank 0 is a tensor of 1 dimensions; it must be a 0-dim floating"),
        ((PLAIN, PLAIN, torch.tensor(2)), "log_scale on rank 0 is 2.0 of torch.int64; it must be a 0-dim floating"),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_other_arguments_are_explained_by_both(
    arguments: tuple[Any, ...], expected: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        monkeypatch.setattr(operators, "_NATIVE_DEVICES", frozenset())
    with pytest.raises(ValueError) as caught:
        clip_loss(*arguments)
    assert expected in str(caught.value)
    with pytest.raises(ValueError) as caught:
        sigmoid_loss(*arguments, SCALE)
    assert expected in str(caught.value)


@pytest.mark.parametrize("bias", [None, -10.0, SCALE[None]])
def test_a_bias_that_is_none_is_explained(bias: Any) -> None:
    with pytest.raises(ValueError, match=r"bias on rank 0 is .*; it must be a 0-dim floating tensor"):
        sigmoid_loss(PLAIN, PLAIN, SCALE, bias)


@pytest.mark.parametrize(
    ("image", "text", "parts"),
    [
        (torch.ones(0, 4), torch.ones(0, 4), ["image_BE on rank 0 is [0, 4], empty", "skip this batch"]),
        (torch.ones(3, 4), torch.ones(2, 4), ["[3, 4] and text_BE [2, 4] on rank 0"]),
        (torch.full((3, 4), float("nan")), torch.ones(3, 4), ["image_BE on rank 0 in 3 of 3 rows, first in row 0"]),
    ],
)
def test_bad_input_is_an_error_without_a_group_too(image: Tensor, text: Tensor, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        clip_loss(image, text, torch.tensor(1.0))
    assert all(part in str(caught.value) for part in parts), caught.value
