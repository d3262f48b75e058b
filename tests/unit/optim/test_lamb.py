"""LAMB against its formulas written out one tensor at a time in fp64, and against implementations by others."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm.optim
import torch
import torch_optimizer
from torch import Tensor, nn

from megaeva.optim import lamb
from megaeva.optim.lamb import Lamb, ShardMap, multi_tensor_package

Form = Literal["eva", "lamb"]


def _reference_step(
    form: Form,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    b1, b2 = betas
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g * g)
    if form == "eva":  # DeepSpeed csrc/lamb/fused_lamb_cuda_kernel.cu
        u = m / (v.sqrt() + eps) + decay * p
        rate, bounds = lr * math.sqrt(1 - b2**t) / (1 - b1**t), (0.01, 10.0)
    else:  # algorithm 2 of arXiv 1904.00962
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps) + decay * p
        rate, bounds = lr, (0.0, math.inf)
    p_norm, u_norm = p.norm().item(), u.norm().item()
    ratio = 1.0 if p_norm == 0 or u_norm == 0 else min(bounds[1], max(bounds[0], p_norm / u_norm))
    p.sub_(rate * ratio * u)


@pytest.mark.parametrize("chunk", [1, 20, 1 << 18])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("form", ["eva", "lamb"])
def test_steps_equal_the_formula(form: Form, decay: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lamb._CHUNK_NUMBERS, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (7,), (3, 2, 4), ()]
    # Norms from tiny to large, so that both bounds of eva's trust ratio are reached.
    start = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, (1.0, 1e-4, 200.0, 0.5))]
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = Lamb(params, form=form, lr=3e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    expected = [p.double() for p in start]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for t in range(1, 6):
        for p, e, (m, v) in zip(params, expected, moments):
            p.grad = torch.randn(p.shape, generator=generator)
            _reference_step(form, e, p.grad.double(), m, v, t, 3e-2, (0.9, 0.95), 1e-6, decay)
        optimizer.step()
    for p, e, (m, v) in zip(params, expected, moments):
        assert (p.double() - e).norm() <= 1e-6 * e.norm()
        for key, moment in (("exp_avg", m), ("exp_avg_sq", v)):
            assert (optimizer.state[p][key].double() - moment).norm() <= 1e-6 * moment.norm()


# With what each does differently by default. timm clips the global gradient norm to 1 and takes tensors without weight
# decay for Adam's; torch-optimizer bounds |p| by 10 where DeepSpeed bounds |p| / |u|, and corrects no bias.
PEERS: dict[Form, Callable[[Any], torch.optim.Optimizer]] = {
    "lamb": lambda groups: timm.optim.Lamb(groups, max_grad_norm=None, always_adapt=True, betas=(0.9, 0.98), eps=1e-6),
    "eva": lambda groups: torch_optimizer.Lamb(groups, debias=True, clamp_value=math.inf, betas=(0.9, 0.98), eps=1e-6),
}


@pytest.mark.parametrize("form", PEERS)
def test_a_toy_problem_goes_as_with_a_peer(form: Form) -> None:
    """20 steps of a small regression, weights decayed and biases not, at two learning rates."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    optimizers: list[torch.optim.Optimizer] = []
    for net, make in (
        (ours, lambda groups: Lamb(groups, form=form, betas=(0.9, 0.98), eps=1e-6)),
        (theirs, PEERS[form]),
    ):
        weights, biases = ([p for p in net.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False))
        optimizers.append(
            make(
                [
                    {"params": weights, "lr": 0.02, "weight_decay": 0.1},
                    {"params": biases, "lr": 0.05, "weight_decay": 0.0},
                ]
            )
        )
    losses = []
    for _ in range(20):
        for net, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        if form == "eva":  # DeepSpeed's bounds, which the peer lacks, must not bind here
            assert all(0.01 < optimizers[1].state[p]["trust_ratio"] < 10 for p in theirs.parameters())
    assert losses[-1] < 0.9 * losses[0]
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert (p - q).norm() <= 1e-6 * q.norm()


def test_trust_ratio_applies_without_weight_decay() -> None:
    """timm's Lamb would be Adam here; the step must grow with the parameter's norm."""
    moved = []
    for scale in (1.0, 3.0):
        p = nn.Parameter(torch.full((4, 4), scale))
        optimizer = Lamb([p], lr=0.01, weight_decay=0.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append((p.detach() - scale).abs().max().item())
    assert moved[1] == pytest.approx(3 * moved[0], rel=1e-4)


def test_zero_tensor_has_ratio_one() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Lamb([p], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    p.grad = torch.ones(4)
    optimizer.step()
    # u = 0.1 / sqrt(0.01) = 1; bias factor sqrt(0.01) / 0.1 = 1.
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.01))


def test_pieces_of_one_tensor_share_its_ratio() -> None:
    """Two halves mapped to one tensor move as the whole does, not each by its own norm."""
    whole = torch.cat([torch.full((3,), 0.1), torch.full((3,), 5.0)])
    grad = torch.arange(1.0, 7.0)
    p = nn.Parameter(whole.clone())
    optimizer = Lamb([p], lr=0.01)
    p.grad = grad.clone()
    optimizer.step()

    halves = [nn.Parameter(piece.clone()) for piece in whole.chunk(2)]
    optimizer = Lamb(halves, lr=0.01)
    optimizer.shard_map = ShardMap(1, dict.fromkeys(halves, 0), torch.device("cpu"))
    for half, piece in zip(halves, grad.chunk(2)):
        half.grad = piece.clone()
    optimizer.step()
    torch.testing.assert_close(torch.cat(halves).detach(), p.detach(), rtol=1e-6, atol=0)


def test_parameters_without_gradient_stay() -> None:
    still, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lamb([still, moving], lr=0.1)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moving.tolist() != [1.0, 1.0]


def test_the_package_of_the_multi_tensor_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron-core found it: its plain loop here, an object of Transformer Engine's or apex's class on a GPU."""
    assert multi_tensor_package() is None
    for module, package in (
        ("transformer_engine.pytorch.optimizers.multi_tensor_apply", "Transformer Engine"),
        ("apex.multi_tensor_apply.multi_tensor_apply", "apex"),
    ):
        monkeypatch.setattr(lamb.clip_grads, "multi_tensor_applier", type("Applier", (), {"__module__": module})())
        assert multi_tensor_package() == package


def test_norms_by_a_multi_tensor_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signatures of Transformer Engine's and apex's."""

    def applier(op: Any, overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
        return op(2048 * 32, overflow, lists, *args)

    def l2norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, Tensor]:
        assert overflow.dtype == torch.int and per_tensor
        norms = torch.stack([tensor.norm() for tensor in lists[0]])
        return norms.norm(), norms

    monkeypatch.setattr(lamb.clip_grads, "multi_tensor_applier", applier)
    monkeypatch.setattr(lamb.clip_grads, "l2_norm_impl", l2norm)
    assert lamb._fused_norms([torch.ones(4), torch.ones(3, 3)]).tolist() == [2.0, 3.0]
