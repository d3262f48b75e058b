"""What a save costs training: how long the loop stands still for one, and how much slower the steps beside it are.

The loop is the trainer's own: it reads shards, steps and saves. What it waits for a save is timed where it does:
beginning one, at the gate before the optimizer's step, and between steps when the files are written.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaeva.bench.compare import Comparison, row
from megaeva.checkpoint.background import Saves
from megaeva.config.schema import (
    Config,
    DataSection,
    ModelSection,
    OptimSection,
    SaveSection,
    TowerOptimSection,
    TrainSection,
)
from megaeva.data.synthetic import make_shards
from megaeva.parallel.runtime import start, stop
from megaeva.trainer import Trainer

BOUND = 0.05
"""Largest share of a synchronous save's time that the loop may stand still for an asynchronous one."""
_QUIET_STEPS = 2  # of each round, without a save
_BEGINNING, _GATE, _BETWEEN = _WAITS = ("beginning", "before the optimizer's step", "between steps")


@dataclass(frozen=True)
class CheckpointTimes:
    """What `benchmark_checkpoint` measured.

    Attributes:
        stalls: milliseconds that the loop stood still, ours for an asynchronous save, the peer's for a synchronous one.
        parts: median milliseconds of an asynchronous stall by where the loop stood.
        first_ms: the stall for the first asynchronous save of the run, when its memory is touched for the first time.
        step_ms: median of a step without a save.
        slowdown_ms: for each asynchronous save, what the steps beside it took longer, their stalls left out.
        num_bytes: of a checkpoint.
    """

    stalls: Comparison
    parts: dict[str, float]
    first_ms: float
    step_ms: float
    slowdown_ms: tuple[float, ...]
    num_bytes: int

    def report(self, command: str) -> list[str]:
        """Sentences, and the row for the log's table of saves: date, commit, command, ms, ms, ratio, machine."""
        ours, peer, ratio = self.stalls.ours, self.stalls.peer, self.stalls.ours_per_peer
        where = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.parts.items())
        slower = statistics.median(self.slowdown_ms)
        spread = f"{min(self.slowdown_ms):.0f} to {max(self.slowdown_ms):.0f}"
        return [
            f"a save of {self.num_bytes / 1e9:.2f} GB: the loop stands still {peer:.0f} ms if it waits for the files, "
            f"{ours:.1f} ms if they are written beside it; ratio {ratio} (bound {BOUND}: "
            f"{'kept' if ratio.median <= BOUND else 'MISSED'})",
            f"of the {ours:.1f} ms: {where}; the first save of the run {self.first_ms:.1f} ms",
            f"steps without a save take {self.step_ms:.0f} ms; those beside a save took {slower:.0f} ({spread}) ms "
            f"longer together, {100 * slower / peer:.0f} % of a synchronous save: threads share cores and memory",
            row(f"`{command}`", f"{ours:.1f}", f"{peer:.0f}", str(ratio), f"{slower:.0f}"),
        ]


def benchmark_checkpoint(
    model: ModelSection, *, batch_size: int, precision: Literal["fp32", "bf16"], num_rounds: int, folder: Path
) -> CheckpointTimes:
    """Trains and saves in a new folder inside `folder`, by turns with and without waiting for the files.

    Memory: the model with gradients and optimizer state, and a copy of weights and optimizer state.

    Raises:
        UserError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint_") as scratch:
        runtime = start("auto")
        try:
            make_shards(Path(scratch) / "shards", num_shards=1, samples_per_shard=4 * batch_size, image_size=64)
            cfg = recipe(model, Path(scratch), batch_size, precision)
            trainer = Trainer(cfg, runtime, resume=False, recipe_changes=[])
            try:
                return _measure(trainer, num_rounds)
            finally:
                trainer.saves.close()
                trainer.loader.close()
                trainer.record.close()
        finally:
            stop()


def recipe(model: ModelSection, folder: Path, batch_size: int, precision: Literal["fp32", "bf16"]) -> Config:
    """A contrastive recipe on the shards in `folder`/shards that saves only when asked."""
    return Config(
        task="contrastive",
        run_dir=str(folder / "run"),
        model=model,
        data=DataSection(train=(str(folder / "shards" / "*.tar"),), shuffle_buffer=batch_size),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-5), logit_scale_lr=1e-5),
        train=TrainSection(total_samples=batch_size * 1_000_000_000, global_batch_size=batch_size, precision=precision),
        save=SaveSection(every_steps=None, every_minutes=None, keep=1),
    )


class _Stopwatch:
    """Milliseconds spent in methods, by name; what one calls of the others counts as its own."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(_WAITS, 0.0)
        self._running = False

    def time(self, target: Any, method: str, name: str) -> None:
        """Replace a method of an object with one that is timed."""
        function = getattr(target, method)

        def call(*args: Any) -> None:
            if self._running:
                function(*args)
                return
            self._running, begun = True, time.perf_counter()
            try:
                function(*args)
            finally:
                self.spent[name] += 1e3 * (time.perf_counter() - begun)
                self._running = False

        setattr(target, method, call)


def _measure(trainer: Trainer, num_rounds: int) -> CheckpointTimes:
    waiting, beside = (Saves(trainer.store, step=0, asynchronous=asynchronous) for asynchronous in (False, True))
    stopwatch = _Stopwatch()
    stopwatch.time(trainer, "save", _BEGINNING)
    stopwatch.time(beside, "gate", _GATE)
    stopwatch.time(beside, "advance", _BETWEEN)
    quiet: list[float] = []
    sync_ms: list[float] = []
    stalls: list[dict[str, float]] = []
    slowdowns: list[float] = []
    try:
        for number in range(num_rounds + 1):  # the first warms up
            step_ms = [_iteration(trainer) for _ in range(_QUIET_STEPS)]
            trainer.saves = waiting
            sync_ms.append(_milliseconds(trainer.save))
            step_ms.append(_iteration(trainer))
            quiet += step_ms if number else []
            trainer.saves, before = beside, dict(stopwatch.spent)
            trainer.save()
            times = []
            while beside.in_flight:
                times.append(_iteration(trainer))
            stall = {name: ms - before[name] for name, ms in stopwatch.spent.items()}
            stalls.append(stall)
            within = stall[_GATE] + stall[_BETWEEN]
            slowdowns.append(sum(times) - within - len(times) * statistics.median(step_ms))
    finally:
        beside.close()
        waiting.close()
    newest = trainer.store.newest()
    assert newest is not None
    return CheckpointTimes(
        stalls=Comparison(tuple(sum(stall.values()) for stall in stalls[1:]), tuple(sync_ms[1:])),
        parts={name: statistics.median(stall[name] for stall in stalls[1:]) for name in _WAITS},
        first_ms=sum(stalls[0].values()),
        step_ms=statistics.median(quiet),
        slowdown_ms=tuple(slowdowns[1:]),
        num_bytes=sum(file.stat().st_size for file in newest.iterdir()),
    )


def _iteration(trainer: Trainer) -> float:
    """Milliseconds of the loop's next step."""

    def run() -> None:
        batch, _, _ = trainer.next_batch()
        trainer.step(batch)

    return _milliseconds(run)


def _milliseconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begun)
