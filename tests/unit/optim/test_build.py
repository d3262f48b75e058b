"""The optimizer of real towers and its corner cases, in one process."""

import pytest
import torch

from megaeva.optim import build
from megaeva.optim.build import build_optimizer, kernels_line
from megaeva.parallel.runtime import Runtime
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(runtime: Runtime, bad: float) -> None:
    cfg = make_config(clip_grad_norm=1.0)
    towers = build_towers(runtime, cfg)
    optimizer, rate = build_optimizer(towers, cfg)
    rate.set(0)
    compute_gradients(towers, 0)
    before = [p.detach().clone() for tower in towers for p in tower.module.parameters()]
    towers[1].module.head.weight.main_grad[0, 0] = bad
    updated, norm = optimizer.step()
    assert not updated
    assert not norm < float("inf")
    assert all(torch.equal(a, p) for a, p in zip(before, (p for t in towers for p in t.module.parameters())))
    assert optimizer.num_steps == 0
    compute_gradients(towers, 1)
    assert optimizer.step()[0]


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_below_bf16_resolution_add_up(runtime: Runtime, name: str, distributed: bool) -> None:
    """One step is too small to move a bf16 weight of 1; a hundred add up, as the main copy is fp32."""
    cfg = make_config(
        name=name, precision="bf16", distributed_optimizer=distributed, vision={"lr": 1e-4}, text=None, weight_decay=0.0
    )
    towers = build_towers(runtime, cfg)
    weight = towers[0].module.patch_embed.weight
    weight.data.fill_(1.0)
    optimizer, _ = build_optimizer(towers, cfg)
    compute_gradients(towers, 0)
    optimizer.step()
    assert (weight == 1.0).all()
    for _ in range(100):
        weight.main_grad.fill_(1.0)
        optimizer.step()
    assert (weight < 1.0).all()


def test_a_step_leaves_no_gradient_behind(runtime: Runtime) -> None:
    """mcore's plain optimizer would, and the next backward pass would count it twice."""
    cfg = make_config(distributed_optimizer=False)
    towers = build_towers(runtime, cfg)
    optimizer, rate = build_optimizer(towers, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    norms = []
    for _ in range(2):
        compute_gradients(towers, 0)
        norms.append(optimizer.step()[1])
    assert norms[0] == norms[1]
    assert set(rate.set(0)) == {"vision", "text", "scale"}


def test_the_line_says_what_computes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(build, "multi_tensor_package", lambda: "Transformer Engine")
    assert kernels_line(make_config().optim, cpu) == (
        "optimizer: AdamW, torch's fused kernel; norms and clipping by plain torch"
    )
    assert kernels_line(make_config(name="lamb").optim, cuda) == (
        "optimizer: LAMB (eva), torch's fused Adam kernel and foreach; "
        "norms and clipping by Transformer Engine's multi-tensor kernels"
    )
