"""The plain-PyTorch peer computes what our towers compute: loss, every gradient, and the weights after AdamW."""

from typing import Any

import pytest
import torch

from megaeva.bench import plain
from megaeva.bench.captions import end_tokens
from megaeva.bench.step import MegatronStep, PlainStep, example_batch, recipe
from megaeva.config.schema import TowerOptimSection
from tests.helpers.tiny import random_state, tiny

# One of each: EVA-02 with RoPE, SwiGLU and sub-LN; post-norm; RMSNorm without qkv bias; both; ln_pre, quick GELU.
FAMILIES = ("EVA02-CLIP-B-16", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14-quickgelu")


def both(variant: str, runtime: Any) -> tuple[MegatronStep, PlainStep]:
    model = tiny(variant)
    cfg = recipe(model, 6, "fp32")
    # A rate at which three steps move the weights by far more than they are rounded.
    fast = cfg.optim.model_copy(update={"vision": TowerOptimSection(lr=1e-3), "logit_scale_lr": 1e-3})
    cfg = cfg.model_copy(update={"optim": fast})
    batch = example_batch(model, end_tokens(model.text, 6)[0])
    ours = MegatronStep(cfg, runtime, batch)
    with torch.no_grad():  # before the main copies matter: fp32 weights are their own
        for tower in ours.task.towers[:2]:
            state = random_state({name: p.shape for name, p in tower.module.named_parameters()})
            for name, parameter in tower.module.named_parameters():
                parameter.copy_(state[name])
    return ours, PlainStep(cfg, ours.weights(), batch)


@pytest.mark.parametrize("variant", FAMILIES)
def test_loss_and_gradients_are_equal(variant: str, runtime: Any) -> None:
    ours, peer = both(variant, runtime)
    loss, peer_loss = ours(), peer()
    assert loss == pytest.approx(peer_loss, rel=1e-5)
    gradients = plain.from_megatron(ours.gradients(), ours.cfg.model)
    expected = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    assert gradients.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in expected.items():
        assert gradient is not None
        # A key bias has gradient zero up to rounding: measure such tensors against the whole gradient.
        scale = max(gradient.norm(), 1e-3 * whole)
        assert (gradients[name] - gradient).norm() <= 1e-5 * scale, name


def test_three_steps_leave_equal_weights(runtime: Any) -> None:
    ours, peer = both("EVA02-CLIP-B-16", runtime)
    cfg = ours.cfg.model
    before = {name: weight.clone() for name, weight in plain.from_megatron(ours.weights(), cfg).items()}
    losses = [(ours(), peer()) for _ in range(3)]
    assert losses[2][0] < losses[0][0] - 0.01
    assert losses[2][0] == pytest.approx(losses[2][1], rel=1e-5)
    after = plain.from_megatron(ours.weights(), cfg)
    for name, weight in peer.model.state_dict().items():
        difference, moved = after[name] - weight, weight - before[name]
        if name.endswith("attention.qkv.bias"):
            # The keys' part: its gradient is zero up to rounding, whose sign Adam follows.
            difference, moved = (torch.cat(tensor.chunk(3)[::2]) for tensor in (difference, moved))
        # Adam divides by the gradient's size, so entries with a gradient near zero amplify its rounding.
        assert difference.norm() <= 1e-3 * moved.norm(), name
