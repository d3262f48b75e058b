"""Clipped AdamW and LAMB steps of towers on one grid or on different ones equal one process, torch, timm, a formula."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection
from megaeva.optim.build import build_optimizer
from megaeva.optim.lamb import Lamb
from megaeva.optim.param_groups import param_groups
from megaeva.optim.schedule import LearningRate
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import slice_full
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import Axes, build_towers, compute_gradients, make_config, whole_weights

STEPS = 3
NUM_LAYERS = 5
CLIP = 1.6  # binds in some steps and not in others
# fp32 sums in another order; Adam divides by sqrt(v) + epsilon, which at 1e-6 turns the rounding of a gradient that
# happens to vanish into a step: one weight in 10,000 is then 1e-5 off.
TOLERANCE, EPSILON = 1e-6, 1e-4
# Without weight decay LAMB must still use its trust ratio.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "clip_grad_norm": CLIP},
    "adamw, unclipped, plain": {"name": "adamw", "distributed_optimizer": False},
    "lamb": {"name": "lamb", "clip_grad_norm": CLIP},
    "lamb, no decay": {"name": "lamb", "weight_decay": 0.0},
    "lamb of the paper": {"name": "lamb", "lamb": "lamb", "clip_grad_norm": CLIP},
    "lamb of the paper, no decay": {"name": "lamb", "lamb": "lamb", "weight_decay": 0.0},
    "lamb, plain": {"name": "lamb", "clip_grad_norm": CLIP, "distributed_optimizer": False},
    "adamw, frozen scale": {"name": "adamw", "train_scale": False},
    "eva, 20 steps": {"name": "lamb", "lamb": "eva", "clip_grad_norm": CLIP, "steps": 20},
    "lamb, 20 steps": {"name": "lamb", "lamb": "lamb", "clip_grad_norm": CLIP, "steps": 20},
}
LONG = ("eva, 20 steps", "lamb, 20 steps")
LONG_TOPOLOGIES = ("dp2", "tp2", "tp2 dp2")
VARIANTS_ON_RANKS = ("adamw", "adamw, unclipped, plain", "lamb", "lamb of the paper", "lamb, plain")
TP2, SP2 = AxesSection(tp=2), AxesSection(tp=2, sequence_parallel=True)
PP2, TP2_PP2 = AxesSection(pp=2), AxesSection(tp=2, pp=2)
VPP2 = AxesSection(pp=2, vpp=2, layers_per_stage=(1, 1, 2, 1))
# {ranks: towers' grids}
TOPOLOGIES: dict[int, dict[str, Axes]] = {
    2: {
        "tp2": {"vision": TP2, "text": TP2},
        "sp2": {"vision": SP2, "text": SP2},
        "dp2": {},
        "pp2": {"vision": PP2},
        "vision tp2, text tp1": {"vision": TP2},
    },
    4: {
        "tp2 dp2": {"vision": TP2, "text": TP2},
        "tp2 pp2, text tp2": {"vision": TP2_PP2, "text": TP2},
        "pp2 vpp2 dp2, text sp2": {"vision": VPP2, "text": SP2},
    },
}


def train(
    runtime: Runtime, axes: Axes, variants: Sequence[str] = tuple(VARIANTS)
) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """{variant: (gradient norms, whole weights)} after the variant's steps."""
    results = {}
    for name in variants:
        optim = dict(VARIANTS[name])
        train_scale, steps = optim.pop("train_scale", True), optim.pop("steps", STEPS)
        cfg = make_config(num_layers=NUM_LAYERS, epsilon=EPSILON, **optim)
        towers = build_towers(runtime, cfg, axes, train_scale=train_scale)
        optimizer, rate = build_optimizer(towers, cfg)
        norms = []
        for step in range(steps):
            rate.set(step)
            compute_gradients(towers, step)
            updated, norm = optimizer.step()
            assert updated
            norms.append(norm)
        results[name] = (norms, whole_weights(towers))
    return results


def train_by_formula(runtime: Runtime) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """The same on one process without mcore's optimizers: torch's AdamW, timm's LAMB, and DeepSpeed's written out."""
    results = {}
    for name, variant in VARIANTS.items():
        optim = dict(variant)
        train_scale, steps = optim.pop("train_scale", True), optim.pop("steps", STEPS)
        cfg = make_config(num_layers=NUM_LAYERS, epsilon=EPSILON, **optim)
        towers = build_towers(runtime, cfg, train_scale=train_scale)
        _, rate = build_optimizer(towers, cfg)
        groups = [g for t in towers for g in param_groups(t.name, t.module.named_parameters(), cfg.optim)]
        parameters = [p for group in groups for p in group["params"]]
        common: dict[str, Any] = {"betas": cfg.optim.betas, "eps": cfg.optim.epsilon, "foreach": False}
        if (cfg.optim.name, cfg.optim.lamb) == ("lamb", "lamb"):
            # Else timm clips the global norm to 1 itself, and takes tensors without weight decay for Adam's.
            reference = timm.optim.Lamb(groups, max_grad_norm=None, always_adapt=True, **common)
        else:
            reference = torch.optim.AdamW(groups, **common)
        moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
        norms = []
        for step in range(steps):
            rate.optimizer = _Groups(reference.param_groups)
            rate.set(step)
            compute_gradients(towers, step)
            for p in parameters:
                p.grad = p.main_grad.clone()
            norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip_grad_norm or math.inf)
            norms.append(norm.item())
            if variant["name"] == "adamw" or variant.get("lamb") == "lamb":
                reference.step()
            else:
                _eva_lamb_step(reference.param_groups, moments, step + 1, cfg.optim.betas, cfg.optim.epsilon)
            reference.zero_grad()
        results[name] = (norms, whole_weights(towers))
    return results


class _Groups:
    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


@torch.no_grad()
def _eva_lamb_step(
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
    return train(runtime, {}), train_by_formula(runtime)


@pytest.fixture(scope="module")
def single_and_formula() -> tuple[Result, Result]:
    return run_ranks(on_one_process, 1)[0]


def differences(got: Result, expected: Result) -> dict[str, tuple[float, float]]:
    """{variant: largest relative difference of (a gradient norm, a whole parameter)}."""
    found = {}
    for variant, (norms, weights) in got.items():
        expected_norms, expected_weights = expected[variant]
        assert weights.keys() == expected_weights.keys()
        of_norms = max(abs(a / b - 1.0) for a, b in zip(norms, expected_norms, strict=True))
        of_weights = max(
            ((w - expected_weights[n]).norm() / expected_weights[n].norm()).item() for n, w in weights.items()
        )
        found[variant] = of_norms, of_weights
    return found


def assert_equal(got: Result, expected: Result, topology: str) -> None:
    found = differences(got, expected)
    assert found
    assert all(max(pair) < TOLERANCE for pair in found.values()), (topology, found)


def test_one_process_equals_the_formulas(single_and_formula: tuple[Result, Result]) -> None:
    single, by_formula = single_and_formula
    assert_equal(single, by_formula, "formula")
    norms = single["adamw"][0]
    assert min(norms) < CLIP < max(norms), "the clip must bind in some steps only"


def train_on_all(runtime: Runtime, topologies: dict[str, Axes]) -> dict[str, Result]:
    long = {name: LONG if name in LONG_TOPOLOGIES else () for name in topologies}
    return {name: train(runtime, axes, (*VARIANTS_ON_RANKS, *long[name])) for name, axes in topologies.items()}


def main_copies(runtime: Runtime, axes: Axes) -> dict[str, float]:
    """bf16 towers: the largest relative difference of a main copy from `Lamb` on whole fp32 tensors, by optimizer.

    Gradients are given, as a bf16 pass rounds differently when it is cut.
    """
    found = {}
    for form, distributed in itertools.product(("eva", "lamb"), (True, False)):
        cfg = make_config(
            name="lamb", lamb=form, epsilon=EPSILON, precision="bf16", distributed_optimizer=distributed, num_layers=2
        )
        towers = build_towers(runtime, cfg, axes)
        optimizer, rate = build_optimizer(towers, cfg)
        whole = {name: torch.nn.Parameter(w.float()) for name, w in whole_weights(towers).items()}
        groups = []
        for tower in towers:
            named = {n: whole[f"{tower.name}.{n}"] for n, _ in tower.module.named_parameters()}
            groups += param_groups(tower.name, named.items(), cfg.optim)
        expected = Lamb(groups, form=form, betas=cfg.optim.betas, eps=cfg.optim.epsilon)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            for name in sorted(whole):
                whole[name].grad = torch.randn(whole[name].shape, generator=generator)
            for tower in towers:
                tp = tower.grid.tp_rank, tower.grid.tp_size
                for name, parameter in tower.module.named_parameters():
                    parameter.main_grad.copy_(slice_full(whole[f"{tower.name}.{name}"].grad, parameter, *tp))
            for each in (rate, LearningRate(expected, cfg)):
                each.set(step)
            optimizer.step()
            expected.step()
        errors = []
        for tower in towers:
            names = {p: f"{tower.name}.{n}" for n, p in tower.module.named_parameters()}
            for held in optimizer.held_state(tower.name):
                own, grid = held.state["param"].detach().flatten(), tower.grid
                piece = slice_full(whole[names[held.parameter]], held.parameter, grid.tp_rank, grid.tp_size)
                piece = piece.detach().flatten()[held.start : held.start + own.numel()]
                errors.append(((own - piece).norm() / piece.norm()).item())
                assert held.parameter.dtype == (torch.float32 if tower.name == "scale" else torch.bfloat16)
        found[f"{form}, {'sharded' if distributed else 'whole'}"] = max(errors)
    return found


def on_ranks(runtime: Runtime, topologies: dict[str, Axes]) -> tuple[dict[str, Result], dict[str, float]]:
    return train_on_all(runtime, topologies), main_copies(runtime, {"vision": TP2})


@pytest.mark.parametrize("num_ranks", TOPOLOGIES)
def test_ranks_equal_one_process(single_and_formula: tuple[Result, Result], num_ranks: int) -> None:
    for results, of_main_copies in run_ranks(on_ranks, num_ranks, TOPOLOGIES[num_ranks]):
        for topology, result in results.items():
            assert_equal(result, single_and_formula[0], topology)
        assert len(of_main_copies) == 4
        assert all(error < TOLERANCE for error in of_main_copies.values()), of_main_copies
