"""LAMB against its formula written out one tensor at a time in fp64."""

import math

import pytest
import torch
from torch import Tensor

from megaeva.optim.lamb import Lamb, ShardMap


def _reference_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """DeepSpeed csrc/lamb/fused_lamb_cuda_kernel.cu, written out."""
    b1, b2 = betas
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g * g)
    u = m / (v.sqrt() + eps) + decay * p
    p_norm, u_norm = p.norm().item(), u.norm().item()
    ratio = 1.0 if p_norm == 0 or u_norm == 0 else min(10.0, max(0.01, p_norm / u_norm))
    p.sub_(lr * math.sqrt(1 - b2**t) / (1 - b1**t) * ratio * u)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_steps_equal_the_formula(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (7,), (3, 2, 4), ()]
    # Norms from tiny to large, so that both bounds of the trust ratio are reached.
    start = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, (1.0, 1e-4, 200.0, 0.5))]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = Lamb(params, lr=3e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay)
    expected = [p.double() for p in start]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for t in range(1, 6):
        for p, e, (m, v) in zip(params, expected, moments):
            p.grad = torch.randn(p.shape, generator=generator)
            _reference_step(e, p.grad.double(), m, v, t, 3e-2, (0.9, 0.95), 1e-6, decay)
        optimizer.step()
    for p, e in zip(params, expected):
        assert (p.double() - e).norm() <= 1e-6 * e.norm()


def test_trust_ratio_applies_without_weight_decay() -> None:
    """timm's Lamb would be Adam here; the step must grow with the parameter's norm."""
    moved = []
    for scale in (1.0, 3.0):
        p = torch.nn.Parameter(torch.full((4, 4), scale))
        optimizer = Lamb([p], lr=0.01, weight_decay=0.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append((p.detach() - scale).abs().max().item())
    assert moved[1] == pytest.approx(3 * moved[0], rel=1e-4)


def test_zero_tensor_has_ratio_one() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = Lamb([p], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    p.grad = torch.ones(4)
    optimizer.step()
    # u = 0.1 / sqrt(0.01) = 1; bias factor sqrt(0.01) / 0.1 = 1.
    torch.testing.assert_close(p.detach(), torch.full((4,), -0.01))


def test_pieces_of_one_tensor_share_its_ratio() -> None:
    """Two halves mapped to one tensor move as the whole does, not each by its own norm."""
    whole = torch.cat([torch.full((3,), 0.1), torch.full((3,), 5.0)])
    grad = torch.arange(1.0, 7.0)
    p = torch.nn.Parameter(whole.clone())
    optimizer = Lamb([p], lr=0.01)
    p.grad = grad.clone()
    optimizer.step()

    halves = [torch.nn.Parameter(piece.clone()) for piece in whole.chunk(2)]
    optimizer = Lamb(halves, lr=0.01)
    optimizer.shard_map = ShardMap(1, dict.fromkeys(halves, 0), torch.device("cpu"))
    for half, piece in zip(halves, grad.chunk(2)):
        half.grad = piece.clone()
    optimizer.step()
    torch.testing.assert_close(torch.cat(halves).detach(), p.detach(), rtol=1e-6, atol=0)


def test_parameters_without_gradient_stay() -> None:
    still, moving = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([still, moving], lr=0.1)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moving.tolist() != [1.0, 1.0]
