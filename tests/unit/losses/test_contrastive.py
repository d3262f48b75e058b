"""The streaming InfoNCE against the plain one, on one rank."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from megaeva.losses import contrastive
from megaeva.losses.contrastive import clip_loss


def plain_loss(image_BE: Tensor, text_BE: Tensor, log_scale: Tensor) -> Tensor:
    logits = log_scale.exp() * normalize(image_BE, dim=-1) @ normalize(text_BE, dim=-1).T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("num_pairs", [1, 7, 64, 100])
def test_loss_and_gradients_equal_the_plain_formula(num_pairs: int, monkeypatch, single_rank) -> None:
    monkeypatch.setattr(contrastive, "TILE", 32)  # 64: whole tiles; 7, 100: an uneven last one
    generator = torch.Generator().manual_seed(num_pairs)
    values = [torch.randn(num_pairs, 24, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    values.append(torch.tensor(2.3, dtype=torch.float64))
    exact = [value.clone().requires_grad_() for value in values]
    plain_loss(*exact).backward()
    ours = [value.float().requires_grad_() for value in values]
    loss = clip_loss(*ours, group=single_rank.groups.dp)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain_loss(*values), rtol=1e-6, atol=1e-6)
    plain32 = [value.float().requires_grad_() for value in values]
    plain_loss(*plain32).backward()
    for ours_leaf, exact_leaf, plain_leaf in zip(ours, exact, plain32, strict=True):
        error = (ours_leaf.grad.double() - exact_leaf.grad).abs().max()
        plain_error = (plain_leaf.grad.double() - exact_leaf.grad).abs().max()
        assert error <= 2 * plain_error + 1e-9, (error, plain_error)


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
