"""The average of a run's weights: torch's own, kept in shards, exact to undo, saved and read on another layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megaeva.checkpoint.average import AveragedReader
from megaeva.checkpoint.store import CheckpointStore, LoadedState
from megaeva.config.schema import AxesSection
from megaeva.errors import UserError
from megaeva.optim.build import build_optimizer
from megaeva.optim.ema import averaged_weights, update_average
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.wrap import finish_parameter_gather
from tests.helpers.saving import save_now
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import Axes, build_towers, compute_gradients, grid_of, make_config, whole_weights

DECAY, STEPS = 0.7, 3
OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES: dict[str, tuple[Axes, dict[str, Any]]] = {
    "dp2": ({}, {"precision": "fp32", **OVERLAP}),
    "dp2, bf16, LAMB": ({}, {"precision": "bf16", "name": "lamb", "distributed_optimizer": True}),
    "tp2": (
        {"vision": AxesSection(tp=2), "text": AxesSection(tp=2)}, {"precision": "fp32", "distributed_optimizer": False},
    ),
    "tp2, bf16": ({"vision": AxesSection(tp=2)}, {"precision": "bf16", "distributed_optimizer": False}),
}  # fmt: skip
Tensors = dict[str, Tensor]


class Run:
    """Toy towers whose weights are averaged."""

    def __init__(self, runtime: Runtime, axes: Axes, *, seed: int = 0, ema_decay: float | None = DECAY, **optim: Any):
        # With a small epsilon Adam makes lr * sign(gradient) of gradients that are rounding noise.
        self.cfg = make_config(ema_decay=ema_decay, epsilon=1e-3, **optim)
        self.towers = build_towers(runtime, self.cfg, axes, seed=seed)
        self.optimizer, _ = build_optimizer(self.towers, self.cfg)
        self.data_grid = grid_of(AxesSection(tp=max((a.tp for a in axes.values()), default=1)), runtime)

    def step(self, number: int) -> None:
        compute_gradients(self.towers, number)
        assert self.optimizer.step()[0]
        if self.cfg.optim.ema_decay is not None:
            update_average(self.optimizer, self.cfg.optim.ema_decay)

    def weights(self) -> Tensors:
        finish_parameter_gather(self.towers)
        return whole_weights(self.towers)

    def averages(self) -> Tensors:
        finish_parameter_gather(self.towers)
        with averaged_weights(self.optimizer):
            return whole_weights(self.towers)

    def save(self, folder: Path) -> Path:
        notes: dict[str, Any] = {"loader_state": {}, "extra": {}, "data_grid": self.data_grid}
        return save_now(CheckpointStore(folder, 1), 1, self.towers, self.optimizer, config=self.cfg, **notes)

    def load(self, path: Path) -> LoadedState:
        return CheckpointStore(path.parents[1], 1).load(path, self.towers, self.optimizer, config=self.cfg)


def saved_averages(path: Path) -> Tensors:
    reader = AveragedReader(path)
    found = {name: reader.read(name) for name in reader.weights}
    reader.close()
    return found


def same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def check_case(runtime: Runtime, name: str, folder: Path) -> Tensors:
    """Trains, looks at the averages in between, saves, reads it elsewhere; returns the averages as saved."""
    axes, optim = CASES[name]
    run, undisturbed = Run(runtime, axes, **optim), Run(runtime, axes, **optim)
    same(run.averages(), run.weights())
    for step in range(STEPS):
        run.step(step)
        undisturbed.step(step)
        weights = run.weights()
        averages = run.averages()
        assert any(not torch.equal(averages[key], weight) for key, weight in weights.items())
        same(run.weights(), weights)
    same(run.weights(), undisturbed.weights())
    same(run.averages(), undisturbed.averages())
    path = run.save(folder / name)
    averages, saved = run.averages(), saved_averages(path)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    same({key: tensor.to(averages[key].dtype) for key, tensor in saved.items()}, averages)

    elsewhere, _ = CASES["tp2" if name.startswith("dp2") else "dp2"]
    moved = Run(runtime, elsewhere, seed=1, **optim | {"overlap_param_gather": False})
    assert not moved.load(path).average_begins
    same(saved_averages(moved.save(folder / f"{name}, moved")), saved)

    without = Run(runtime, axes, ema_decay=None, **optim)
    without.step(0)
    begins = Run(runtime, axes, seed=1, **optim)
    assert begins.load(without.save(folder / f"{name}, without")).average_begins
    same(begins.averages(), without.weights())
    return saved


def an_uncovered_parameter(runtime: Runtime) -> str:
    """What each rank is told of a parameter without a rule that only rank 1 has, as a stage may."""
    cfg = make_config()
    towers = build_towers(runtime, cfg)
    if runtime.rank == 1:
        towers[1].module.gate = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError) as caught:
        build_optimizer(towers, cfg)
    return str(caught.value)


def check_all(runtime: Runtime, folder: Path) -> tuple[dict[str, Tensors], str]:
    return {name: check_case(runtime, name, folder) for name in CASES}, an_uncovered_parameter(runtime)


def by_torch(runtime: Runtime) -> tuple[Tensors, Tensors]:
    """The averages of a single process, ours and those of torch's AveragedModel of the same weights."""
    run = Run(runtime, {}, precision="fp32", distributed_optimizer=False)
    plain = nn.ParameterList([tensor.clone() for tensor in run.weights().values()])
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(plain)  # the first copies
    for step in range(STEPS):
        run.step(step)
        for parameter, tensor in zip(plain, run.weights().values(), strict=True):
            parameter.data.copy_(tensor)
        averaged.update_parameters(plain)
    return run.averages(), dict(zip(run.weights(), averaged.module.parameters(), strict=True))


def test_it_is_torchs_and_the_same_in_shards(runtime: Runtime, tmp_path: Path) -> None:
    ours, theirs = by_torch(runtime)
    same(ours, theirs)
    ranks = run_ranks(check_all, 2, tmp_path)
    for found, message in ranks:
        for name in ("dp2", "tp2"):
            for key, tensor in ours.items():
                assert (found[name][key] - tensor).norm() <= 1e-6 * tensor.norm(), (name, key)
        assert "0 rules for learning rate and weight decay cover parameter 'gate'" in message
