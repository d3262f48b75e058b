"""A run that is saved on one layout and resumed on another: the samples and losses of the run that never moved."""

import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.collectives import gather_objects
from megaeva.parallel.runtime import Runtime
from megaeva.trainer import Trainer
from tests.helpers.spawn import run_ranks
from tests.helpers.trainer_recipe import model, trainer_recipe

SAVED_AT, STEPS = 4, 14  # an epoch ends after step 5, the first phase of two after 7, an epoch of the second after 12
Keys = list[list[str]]  # of the global batch of each step


class Move(NamedTuple):
    """Numbers of ranks and the recipe's `parallel`, before and after."""

    ranks_before: int
    before: dict[str, Any]
    ranks_after: int
    after: dict[str, Any]


TP2, PP2 = {"tp": 2}, {"pp": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MOVES = {
    "tp2 pp2 dp1 to dp2": Move(4, {"vision": {"tp": 2, "pp": 2}, "text": TP2}, 2, {}),
    "dp4 to tp2": Move(4, {}, 2, {"vision": {"tp": 2, "sequence_parallel": True}, "text": TP2}),
    "tp2 dp2 to pp2": Move(4, {"vision": TP2, "text": TP2, **OVERLAP}, 2, {"vision": PP2}),
    "pp2 vpp2 to dp1": Move(2, {"vision": {"pp": 2, "vpp": 2}}, 1, {}),
}


def recipe(folder: Path, name: str, parallel: dict[str, Any]) -> Config:
    return trainer_recipe(
        folder,
        name,
        STEPS,
        parallel=parallel,
        # Drop path and patch dropout: what is drawn has to move with the samples.
        model=model(vision_layers=4, text_layers=1),
        # With a small epsilon Adam makes lr * sign(gradient) of gradients that are rounding noise.
        optim={"vision": {"lr": 2e-3}, "clip_grad_norm": 1.0, "epsilon": 1e-3},
        save={"every_steps": SAVED_AT, "keep": 9},
        data={
            # In whole steps 7 and 7. The second phase drops no patch: other lengths in the pipeline.
            "phases": [
                {"samples": 8 * 7 + 3, "train": [str(folder / "shards" / "*.tar")]},
                {"samples": 8 * 7 - 3, "train": [str(folder / "shards" / "*.tar")], "patch_dropout": 0.0},
            ],
            "shuffle_buffer": 8,
            "max_dropped_share": 1.0,
        },
    )


def train(runtime: Runtime, cfg: Config, *, resume: bool) -> Keys:
    trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
    seen: Keys = []
    original = trainer.step

    def step(batch: Batch) -> dict[str, float]:
        mine = batch.keys if trainer.task.grid.tp_rank == 0 else ()
        seen.append([key for keys in gather_objects(mine) for key in keys])
        return original(batch)

    trainer.step = step  # type: ignore[method-assign]
    assert trainer.fit() == 0
    return seen


def stay(runtime: Runtime, folder: Path, names: Iterable[str]) -> dict[str, Keys]:
    """The runs that never move."""
    return {name: train(runtime, recipe(folder, name, MOVES[name].before), resume=False) for name in names}


def move(runtime: Runtime, folder: Path, names: Iterable[str]) -> dict[str, Keys]:
    """Goes on from their checkpoints at step SAVED_AT."""
    seen = {}
    for name in names:
        target = folder / f"{name}, moved"
        if runtime.is_main:
            shutil.copytree(folder / name, target)
            for later in sorted((target / "checkpoints").iterdir())[1:]:
                shutil.rmtree(later)
        torch.distributed.barrier()
        seen[name] = train(runtime, recipe(folder, target.name, MOVES[name].after), resume=True)
    return seen


class Ran(NamedTuple):
    folder: Path
    stayed: dict[str, Keys]
    moved: dict[str, Keys]


# Every start of four processes takes its time: the issue's own move in `make test`, all the others beside.
@pytest.fixture(scope="module", params=[slice(1), pytest.param(slice(1, None), marks=pytest.mark.exhaustive)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    moves = dict(list(MOVES.items())[request.param])
    ran = Ran(tmp_path_factory.mktemp("moves"), {}, {})
    make_shards(ran.folder / "shards", num_shards=4, samples_per_shard=10, image_size=40, seed=0)
    with tarfile.open(ran.folder / "shards" / "broken.tar", "w") as tar:
        for name in ("a.txt", "b.txt"):  # samples without an image
            tar.addfile(tarfile.TarInfo(name))
    for act, found, size in (
        (stay, ran.stayed, lambda name: MOVES[name].ranks_before),
        (move, ran.moved, lambda name: MOVES[name].ranks_after),
    ):
        for ranks in sorted(set(map(size, moves))):
            names = [name for name in moves if size(name) == ranks]
            found.update(run_ranks(act, ranks, ran.folder, names)[0])
    return ran


def test_a_moved_run_has_the_losses_and_samples_of_one_that_stayed(ran: Ran) -> None:
    assert ran.moved.keys() == ran.stayed.keys() and ran.moved
    for name in ran.moved:
        check(ran, name)


def check(ran: Ran, name: str) -> None:
    assert ran.moved[name] == ran.stayed[name][SAVED_AT:], "global batches, in their order"
    stayed, moved = (read_metrics(ran.folder / run) for run in (name, f"{name}, moved"))
    assert [line["step"] for line in moved] == list(range(1, STEPS + 1))
    assert [line["phase"] for line in moved] == [1] * 7 + [2] * 7
    for figure in ("loss", "grad_norm", "logit_scale"):
        expected = [line[figure] for line in stayed[SAVED_AT:]]
        found = [line[figure] for line in moved[SAVED_AT:]]
        assert found == pytest.approx(expected, rel=1e-5), figure
    dropped = [
        json.loads((ran.folder / run / "finished.json").read_text())["dropped_samples"]
        for run in (name, f"{name}, moved")
    ]
    assert dropped[0] == dropped[1] and dropped[0]["missing_image"] >= 4, (
        "counted once over all blocks, before and after, in both phases"
    )
    losses = [line["loss"] for line in moved[SAVED_AT:]]
    assert max(losses) > min(losses) * (1 + 1e-3), "the samples must tell in the loss"
