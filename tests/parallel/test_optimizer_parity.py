"""Clipped AdamW and LAMB steps on 2 and 4 ranks, split over tp and dp, equal one process and the formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.optim.build import build_optimizer
from megaeva.optim.param_groups import param_groups
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import gather_full
from megaeva.parallel.wrap import Tower
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config

STEPS = 3
# clip 2.0 binds in some steps and not in others; without weight decay LAMB must still use its trust ratio.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "clip_grad_norm": 2.0},
    "adamw, unclipped, plain": {"name": "adamw", "distributed_optimizer": False},
    "lamb": {"name": "lamb", "clip_grad_norm": 2.0},
    "lamb, no decay": {"name": "lamb", "weight_decay": 0.0},
    "lamb, plain": {"name": "lamb", "clip_grad_norm": 2.0, "distributed_optimizer": False},
    "adamw, frozen scale": {"name": "adamw", "train_scale": False},
}
TOPOLOGIES = [(2, 1), (2, 2), (4, 2)]


def whole_weights(towers: list[Tower]) -> dict[str, Tensor]:
    """Clones, as a parameter's storage is reused by the next variant."""
    return {
        f"{tower.name}.{name}": gather_full(parameter, parameter, tower.grid).clone()
        for tower in towers
        for name, parameter in tower.module.named_parameters()
    }


def train(runtime: Runtime, tp: int) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """{variant: (gradient norms, whole weights)} after STEPS steps."""
    results = {}
    for name, variant in VARIANTS.items():
        optim = dict(variant)
        train_scale = optim.pop("train_scale", True)
        cfg = make_config(**optim)
        towers = build_towers(runtime, cfg, tp, train_scale=train_scale)
        optimizer, rate = build_optimizer(towers, cfg)
        norms = []
        for step in range(STEPS):
            rate.set(step)
            compute_gradients(towers, step)
            updated, norm = optimizer.step()
            assert updated
            norms.append(norm)
        results[name] = (norms, whole_weights(towers))
    return results


def train_by_formula(runtime: Runtime) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """The same on one process without mcore's optimizers: torch.optim.AdamW, and LAMB written out."""
    results = {}
    for name, variant in VARIANTS.items():
        optim = dict(variant)
        train_scale = optim.pop("train_scale", True)
        cfg = make_config(**optim)
        towers = build_towers(runtime, cfg, 1, train_scale=train_scale)
        _, rate = build_optimizer(towers, cfg)
        groups = [g for t in towers for g in param_groups(t.name, t.module.named_parameters(), cfg.optim)]
        rate.optimizer = _Groups(groups)
        parameters = [p for group in groups for p in group["params"]]
        adamw = torch.optim.AdamW(groups, betas=cfg.optim.betas, eps=cfg.optim.epsilon, foreach=False)
        moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
        norms = []
        for step in range(STEPS):
            rate.optimizer = _Groups(adamw.param_groups)
            rate.set(step)
            compute_gradients(towers, step)
            for p in parameters:
                p.grad = p.main_grad.clone()
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip_grad_norm or math.inf)
            norms.append(norm.item())
            if cfg.optim.name == "adamw":
                adamw.step()
            else:
                _lamb_step(adamw.param_groups, moments, step + 1, cfg.optim.betas, cfg.optim.epsilon)
            adamw.zero_grad()
        results[name] = (norms, whole_weights(towers))
    return results


class _Groups:
    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


@torch.no_grad()
def _lamb_step(
    groups: list[dict[str, Any]],
    moments: dict[Tensor, tuple[Tensor, Tensor]],
    t: int,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    b1, b2 = betas
    for group in groups:
        for p in group["params"]:
            m, v = moments[p]
            m.mul_(b1).add_((1 - b1) * p.grad)
            v.mul_(b2).add_((1 - b2) * p.grad**2)
            u = m / (v.sqrt() + epsilon) + group["weight_decay"] * p
            ratio = (p.norm() / u.norm()).clamp(0.01, 10.0) if p.norm() > 0 and u.norm() > 0 else 1.0
            p -= group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) * ratio * u


Result = dict[str, tuple[list[float], dict[str, Tensor]]]


def on_one_process(runtime: Runtime) -> tuple[Result, Result]:
    return train(runtime, 1), train_by_formula(runtime)


@pytest.fixture(scope="module")
def single_and_formula() -> tuple[Result, Result]:
    return run_ranks(on_one_process, 1)[0]


def assert_equal(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for variant, (norms, weights) in got.items():
        expected_norms, expected_weights = expected[variant]
        assert norms == pytest.approx(expected_norms, rel=1e-5), variant
        for name, weight in weights.items():
            error = (weight - expected_weights[name]).norm() / expected_weights[name].norm()
            assert error < 1e-5, (variant, name, error.item())


def test_one_process_equals_the_formulas(single_and_formula: tuple[Result, Result]) -> None:
    single, by_formula = single_and_formula
    assert_equal(single, by_formula)
    norms = single["adamw"][0]
    assert min(norms) < 2.0 < max(norms), "the clip must bind in some steps only"


@pytest.mark.parametrize(("num_ranks", "tp"), TOPOLOGIES)
def test_ranks_equal_one_process(single_and_formula: tuple[Result, Result], num_ranks: int, tp: int) -> None:
    for result in run_ranks(train, num_ranks, tp):
        assert_equal(result, single_and_formula[0])
