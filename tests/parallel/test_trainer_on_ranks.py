"""The trainer on two ranks: data are shared out, a resumed run repeats every loss, one rank's error stops both."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaeva.checkpoint import layout
from megaeva.checkpoint.torch_dist import FileWriter
from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.synthetic import make_shards
from megaeva.errors import DataError
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.collectives import RemoteError, gather_objects
from megaeva.parallel.runtime import Runtime
from megaeva.tasks.start import opened_start
from megaeva.trainer import Trainer
from tests.helpers.spawn import run_ranks
from tests.helpers.trainer_recipe import model, trainer_recipe

STEPS, SAVED_AT, DIES_AT = 6, 3, 5


def recipe(folder: Path, name: str, *, asynchronous: bool = False) -> Config:
    return trainer_recipe(
        folder,
        name,
        STEPS,
        model=model(vision_layers=2, text_layers=1),
        optim={"name": "lamb", "vision": {"lr": 1e-2}, "clip_grad_norm": 1.0},
        parallel={"overlap_grad_reduce": True, "overlap_param_gather": True},
        save={"every_steps": SAVED_AT, "asynchronous": asynchronous},
    )


class Died(Exception):
    """Stands for a killed job."""


def run(runtime: Runtime, cfg: Config, *, resume: bool = False, dies_at: int | None = None) -> list[list[str]]:
    """Sample keys of each step on this rank."""
    trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
    seen: list[list[str]] = []
    original = trainer.step

    def step(batch: Batch) -> dict[str, float]:
        if trainer.next_step == dies_at:
            raise Died
        seen.append(list(batch.keys))
        return original(batch)

    trainer.step = step  # type: ignore[method-assign]
    trainer.fit()
    return seen


def slowly(write: Callable[..., None]) -> Callable[..., None]:
    """A write after which a save takes as long as two steps."""

    def call(*arguments: Any) -> None:
        time.sleep(0.003)
        write(*arguments)

    return call


def scenario(runtime: Runtime, folder: str) -> tuple[list[list[str]], list[str]]:
    """Sample keys of an uninterrupted run; what a broken loader of rank 1 raised on this rank."""
    root = Path(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileWriter, "write", slowly(FileWriter.write))
        seen = run(runtime, recipe(root, "whole", asynchronous=True))
    with pytest.raises(Died):
        run(runtime, recipe(root, "cut"), dies_at=DIES_AT)
    again = run(runtime, recipe(root, "cut"), resume=True)
    assert again == seen[SAVED_AT:]

    with pytest.MonkeyPatch.context() as patch:
        if runtime.rank == 1:  # it looks before the last save of a run that trains has its name
            patch.setattr(layout, "complete_checkpoints", lambda folder: [folder / "step_00000003"])
        with opened_start(str(root / "whole"), recipe(root, "other"), ["vision"]) as weights:
            assert weights.path.name == "step_00000006", "all ranks read one checkpoint"

    trainer = Trainer(recipe(root, "broken"), runtime, resume=False, recipe_changes=[])
    if runtime.rank == 1:

        def fail() -> Any:
            raise DataError("the disk of rank 1 is gone")

        trainer.loader = type("Broken", (), {"__next__": lambda self: fail(), "__getattr__": lambda self, name: dict})()
    with pytest.raises((DataError, RemoteError)) as caught:
        trainer.next_batch()
    return seen, gather_objects(f"{type(caught.value).__name__}: {caught.value}")


def test_two_ranks_share_resume_and_stop_together(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=4, samples_per_shard=12, image_size=40, seed=0)
    (seen_0, errors), (seen_1, _) = run_ranks(scenario, 2, str(tmp_path))
    epoch = [key for seen in (seen_0, seen_1) for keys in seen for key in keys]
    assert len(epoch) == 8 * STEPS == len(set(epoch)), "an epoch of 48 samples, each on one rank once"

    figures = {
        name: [
            {key: value for key, value in line.items() if key in ("step", "loss", "grad_norm", "logit_scale")}
            for line in read_metrics(tmp_path / name)
        ]
        for name in ("whole", "cut")
    }
    assert [line["step"] for line in figures["whole"]] == list(range(1, STEPS + 1))
    assert figures["cut"] == figures["whole"], "bit for bit"
    for step in (SAVED_AT, STEPS):
        beside, waited = (tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("whole", "cut"))
        for rank in (0, 1):
            file = f"__{rank}_0.distcp"
            assert (beside / file).read_bytes() == (waited / file).read_bytes(), "written beside later steps, or not"
    assert errors[0].startswith("RemoteError: rank 1 failed while reading data: DataError: the disk of rank 1 is gone")
    assert errors[1] == "DataError: the disk of rank 1 is gone"
