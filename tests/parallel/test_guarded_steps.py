"""Steps that are left out, on four ranks: overflows of fp16, spikes, and the way back to a checkpoint."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection, Config
from megaeva.data.batch import Batch
from megaeva.data.synthetic import make_shards
from megaeva.model.fp8 import fp8_linears
from megaeva.observability.metrics import read_metrics
from megaeva.optim.build import build_optimizer
from megaeva.parallel import grid as grid_module
from megaeva.parallel.collectives import gather_objects
from megaeva.parallel.runtime import Runtime
from megaeva.trainer import Trainer
from tests.helpers.parallel_runs import whole_weights
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config
from tests.helpers.trainer_recipe import model, trainer_recipe

TP2 = AxesSection(tp=2)
STEPS, SAVED_AT = 7, 4
SPIKES = (3, 6)
"""Batches, counted from 0 over the whole run: before the first checkpoint and after it."""
FP8 = {"rehearse": True, "linears": ["qkv", "proj"], "first_layers_bf16": 0, "last_layers_bf16": 0}
"""recipe=delayed: its scales and histories go back as well."""
MEASURED = ("wall_time", "samples_per_second", "data_wait_share", "memory_gib")


def recipe(folder: Path, name: str, *, asynchronous: bool = False, **train: Any) -> Config:
    return trainer_recipe(
        folder,
        name,
        STEPS,
        model=model(vision_layers=1, text_layers=1),
        optim={"vision": {"lr": 1e-3}, "clip_grad_norm": 1.0, "ema_decay": 0.5},
        parallel={"vision": {"tp": 2}, "text": {"tp": 2}, "overlap_param_gather": True},
        save={"every_steps": SAVED_AT, "asynchronous": asynchronous},
        train={
            "total_samples": 8 * STEPS, "global_batch_size": 8, "micro_batch_size": 4, "log_every_steps": 1,
            "precision": "fp32",
        } | train,
    )  # fmt: skip


def run_state(trainer: Trainer) -> list[Tensor]:
    """The averages and what FP8 goes on with, as far as this rank holds them."""
    towers = trainer.task.towers
    averages = [held.state["ema"] for tower in towers for held in trainer.optimizer.held_state(tower.name)]
    histories = [x for tower in towers for part in fp8_linears(tower.module) for x in part.run_state().values()]
    assert averages and len(histories) == 8
    return averages + histories


class Died(Exception):
    """Stands for a killed job."""


class Run:
    """A run whose loss is 1,000 times as high in some batches, as rank 1 sees it, and whose norms differ by rank."""

    def __init__(
        self, runtime: Runtime, cfg: Config, *, resume: bool = False, first: int = 0, dies_at: int = -1
    ) -> None:
        """Args:
        first: number of the first batch.
        dies_at: number of the batch that is not trained any more.
        """
        self.trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
        self.keys: list[list[str]] = []
        saved: dict[str, Tensor] = {}
        saved_state: list[Tensor] = []
        step, task_step, prepare = self.trainer.step, self.trainer.task.step, self.trainer.optimizer.prepare

        def watched(batch: Batch) -> dict[str, float]:
            if first + len(self.keys) == dies_at:
                raise Died
            self.keys.append(sorted({key for keys in gather_objects(batch.keys) for key in keys}))
            towers = self.trainer.task.towers
            if self.trainer.next_step == SAVED_AT and not saved:
                saved.update(whole_weights(towers))
                saved_state.extend(x.clone() for x in run_state(self.trainer))
            figures = step(batch)
            if not figures:
                assert self.trainer.next_step == SAVED_AT
                assert all(torch.equal(tensor, saved[name]) for name, tensor in whole_weights(towers).items())
                assert all(map(torch.equal, run_state(self.trainer), saved_state))
            return figures

        def poisoned(*arguments: Any) -> Tensor:
            loss = task_step(*arguments)
            return loss * 1000 if first + len(self.keys) - 1 in SPIKES and runtime.rank == 1 else loss

        def prepared() -> float:
            return prepare() * (1 + 1e-7 * runtime.rank)

        self.trainer.optimizer.prepare = prepared  # type: ignore[method-assign]
        self.trainer.step = watched  # type: ignore[method-assign]
        self.trainer.task.step = poisoned  # type: ignore[method-assign]


def measured_steps(runtime: Runtime, axes: dict[str, AxesSection]) -> list[dict[str, float]]:
    """Figures of three steps, and of each the change of the weights by definition."""
    found = []
    for name, distributed in (("adamw", True), ("lamb", True), ("adamw", False)):
        cfg = make_config(name=name, distributed_optimizer=distributed, epsilon=1e-4, clip_grad_norm=0.5)
        towers = build_towers(runtime, cfg, axes)
        optimizer, rate = build_optimizer(towers, cfg)
        for step in range(3):
            rate.set(step)
            compute_gradients(towers, step)
            before = whole_weights(towers)
            norm = optimizer.prepare()
            figures = optimizer.update(norm, measure=True)
            changes = {key: (value - before[key]).double() for key, value in whole_weights(towers).items()}
            for tower in towers:
                own = torch.cat([change.flatten() for key, change in changes.items() if key.startswith(tower.name)])
                assert figures[f"update_rms/{tower.name}"] == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)
            parts = [value for key, value in figures.items() if key.startswith("grad_norm/")]
            assert math.hypot(*parts) == pytest.approx(norm, rel=1e-6)
            found.append(figures)
    return found


def overflow_on_one_rank(runtime: Runtime, cfg: Config) -> dict[str, Any]:
    """Steps of fp16, where rank 1 alone has gradients that are not finite before step 2."""
    trainer = Trainer(cfg, runtime, resume=False, recipe_changes=[])
    optimizer = trainer.optimizer
    prepare: Callable[[], float] = optimizer.prepare

    def poison() -> float:
        if trainer.next_step == 2 and runtime.rank == 1:
            for parameter in trainer.task.towers[0].module.parameters():
                parameter.main_grad.fill_(math.inf)
        return prepare()

    optimizer.prepare = poison  # type: ignore[method-assign]
    scales, updates, losses = [], [], []
    while trainer.next_step < 4:
        scales.append(optimizer.loss_scale)
        losses.append(trainer.step(trainer.next_batch()[0])["loss"])
        updates.append(optimizer.num_steps)
    trainer.loader.close()
    trainer.record.close()
    return {"scales": scales, "updates": updates, "losses": losses}


def scenario(runtime: Runtime, folder: str) -> dict[str, Any]:
    # Process groups hold threads as long as the process lives; all runs share those of equal axes.
    grid_module.build_grid = functools.cache(grid_module.build_grid)
    root = Path(folder)
    measured = measured_steps(runtime, {"vision": TP2, "text": TP2})
    fp16 = overflow_on_one_rank(runtime, recipe(root, "fp16", precision="fp16", fp16={"initial_scale": 256.0}))

    guard = {"action": "roll_back", "window": 3, "loss_ratio": 50.0, "grad_norm_ratio": None}
    train: dict[str, Any] = {"precision": "fp8", "fp8": FP8, "spike_guard": guard}
    whole = Run(runtime, recipe(root, "whole", asynchronous=True, **train))
    whole.trainer.fit()
    cut = Run(runtime, recipe(root, "cut", **train), dies_at=SPIKES[1] + 2)
    with pytest.raises(Died):
        cut.trainer.fit()
    again = Run(runtime, cut.trainer.cfg, resume=True, first=SPIKES[1] + 1)
    again.trainer.fit()
    assert again.keys == whole.keys[SPIKES[1] + 1 :], "it goes on after the spike, from the checkpoint before it"
    expected = whole_weights(whole.trainer.task.towers)
    for name, tensor in whole_weights(again.trainer.task.towers).items():
        assert torch.equal(tensor, expected[name]), name
    assert all(map(torch.equal, run_state(again.trainer), run_state(whole.trainer)))
    return {
        "measured": measured,
        "fp16": fp16,
        "keys": whole.keys,
        "guards": [run.trainer.guard.state_dict() for run in (whole, again)],
        "num_steps": [run.trainer.optimizer.num_steps for run in (whole, again)],
    }


def test_ranks_leave_out_the_same_steps(tmp_path: Path, runtime: Runtime) -> None:
    make_shards(tmp_path / "shards", num_shards=4, samples_per_shard=20, image_size=40, seed=0)
    first, *others = run_ranks(scenario, 4, str(tmp_path))
    assert all(result == first for result in others)

    for on_ranks, alone in zip(first["measured"], measured_steps(runtime, {}), strict=True):
        for name, value in alone.items():
            # The gradient of the scale is a sum that happens to cancel.
            largest = max(other for key, other in alone.items() if key.split("/")[0] == name.split("/")[0])
            assert on_ranks[name] == pytest.approx(value, rel=1e-6, abs=1e-6 * largest), name

    assert first["fp16"]["scales"] == [256.0, 256.0, 256.0, 128.0]
    assert first["fp16"]["updates"] == [1, 2, 2, 3]

    assert len(first["keys"]) == STEPS + SPIKES[1] - SAVED_AT + 1, "steps 4, 5 and 6 are made twice"
    assert len({key for keys in first["keys"] for key in keys}) == 80, "ten batches of an epoch: no sample twice"
    assert first["num_steps"] == [STEPS - 1] * 2
    for batch, action in zip(SPIKES, ("skipped, as there is no checkpoint", "back to "), strict=True):
        (spike,) = json.loads((tmp_path / "whole" / f"spike_step_{batch}.json").read_text())
        assert spike["keys"] == first["keys"][batch], "each sample once"
        assert spike["then"].startswith(action)
    whole, cut = (
        [{key: value for key, value in line.items() if key not in MEASURED} for line in read_metrics(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert [line["skipped_steps"] for line in whole] == [0, 0, 0, 1, 2, 2, 2]
    assert cut == whole, "bit for bit"
