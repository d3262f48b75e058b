"""Whole runs of one recipe on every layout of two ranks: the losses and results of one rank, resumed bit for bit."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import Config
from megaeva.data.synthetic import make_shards
from megaeva.eval.run import evaluate_run
from megaeva.model.clip_model import build_clip
from megaeva.observability.metrics import read_metrics
from megaeva.parallel import grid as grid_module
from megaeva.parallel.grid import grid_of_one
from megaeva.parallel.runtime import Runtime, start
from megaeva.trainer import Trainer
from tests.helpers.parallel_runs import whole_weights
from tests.helpers.spawn import run_ranks
from tests.helpers.trainer_recipe import model, trainer_recipe

STEPS, SAVED_AT = 6, 3
TP2, SP2, PP2 = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# `parallel` of recipes whose two ranks read the same samples, as a single process does.
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "pp2": {"vision": PP2},
    "pp2_vpp2_overlap": {"vision": {"pp": 2, "vpp": 2}, **OVERLAP},
    "tp2_sp": {"vision": SP2, "text": SP2},
    "vision_tp2": {"vision": TP2},
    "text_tp2_overlap": {"text": TP2, **OVERLAP},
}
MIM: dict[str, dict[str, Any]] = {
    "student_pp2": {"vision": PP2, "teacher": {}},
    "teacher_tp2_overlap": {"vision": {}, "teacher": TP2, **OVERLAP},
}
MODEL = model(vision_layers=4, text_layers=2)


def recipe(folder: Path, name: str, parallel: dict[str, Any], **other: Any) -> Config:
    sections: dict[str, Any] = {
        "model": MODEL,
        # With a small epsilon Adam makes lr * sign(gradient) of gradients that are rounding noise.
        "optim": {"vision": {"lr": 1e-2}, "clip_grad_norm": 1.0, "epsilon": 1e-3},
        "save": {"every_steps": SAVED_AT, "keep": 3},
        "eval": {
            "every_steps": 2, "batch_size": 5,  # divides neither the set nor into two stages
            "retrieval": {"heldout": {"shards": [str(folder / "heldout" / "*.tar")]}},
        },
    }  # fmt: skip
    return trainer_recipe(folder, name, STEPS, parallel=parallel, **sections | other)


def mim(folder: Path, name: str, parallel: dict[str, Any]) -> Config:
    return recipe(
        folder,
        name,
        parallel,
        task="mim",
        model=MODEL | {"vision": MODEL["vision"] | {"patch_dropout": 0.0}},
        mim={"mask": {"num_masked": 6, "min_block": 2}, "stop_grad_patch_embed": 0.1},
        teacher={"checkpoint": str(folder / "one_rank")},
        optim={"name": "lamb", "vision": {"lr": 1e-2}, "clip_grad_norm": 1.0, "epsilon": 1e-3},
    )


def train(cfg: Config, runtime: Runtime, *, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
    assert trainer.fit() == 0
    return trainer


def figures(run_dir: Path) -> list[dict[str, float]]:
    """What a run logged, but for what depends on the machine."""
    measured = ("wall_time", "samples_per_second", "data_wait_share", "memory_gib")
    return [{k: v for k, v in line.items() if k not in measured} for line in read_metrics(run_dir)]


def cut_after(runtime: Runtime, source: Path, target: Path) -> None:
    """A copy of a run as if it had died after the save at step SAVED_AT. All ranks call it."""
    if runtime.is_main:
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoints" / f"step_{STEPS:08d}")
        (target / "finished.json").unlink()
    torch.distributed.barrier()


def train_layouts(runtime: Runtime, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Whole weights, as this rank has them, at the end of each layout's run."""
    weights = {}
    for make, layouts in ((recipe, CONTRASTIVE), (mim, MIM)):
        for name, parallel in layouts.items():
            weights[name] = whole_weights(train(make(folder, name, parallel), runtime).task.towers)
            cut_after(runtime, folder / name, folder / f"{name}_resumed")
            resumed = train(make(folder, f"{name}_resumed", parallel), runtime, resume=True)
            for key, value in whole_weights(resumed.task.towers).items():
                assert torch.equal(value, weights[name][key]), (name, key)
    return weights


def change_layout(runtime: Runtime, folder: Path) -> None:
    """Continues the run of pp2 on another layout."""
    cut_after(runtime, folder / "pp2", folder / "moved")
    train(recipe(folder, "moved", CONTRASTIVE["tp2_sp"]), runtime, resume=True)


def start_from(runtime: Runtime, folder: Path) -> dict[str, Tensor]:
    """Whole weights of a run on tp2 that begins with what a run on pp2 wrote."""
    cfg = recipe(folder, "begun", CONTRASTIVE["tp2_sp"], init={"clip": str(folder / "pp2")})
    return whole_weights(Trainer(cfg, runtime, resume=False, recipe_changes=[]).task.towers)


def on_two_ranks(runtime: Runtime, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    # Process groups hold threads as long as the process lives; all runs share those of equal axes.
    grid_module.build_grid = functools.cache(grid_module.build_grid)
    weights = train_layouts(runtime, folder)
    change_layout(runtime, folder)
    return weights, start_from(runtime, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the runs of one rank."""
    folder = tmp_path_factory.mktemp("layouts")
    make_shards(folder / "shards", num_shards=2, samples_per_shard=24, image_size=40, seed=0)
    make_shards(folder / "heldout", num_shards=1, samples_per_shard=13, image_size=40, seed=1)
    train(recipe(folder, "one_rank", {}), start("cpu"))
    train(mim(folder, "one_rank_mim", {}), start("cpu"))
    return folder


@pytest.fixture(scope="module")
def job(folder: Path) -> list[tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]:
    return run_ranks(on_two_ranks, 2, folder)


def read_whole(run_dir: Path) -> dict[str, Tensor]:
    """The newest checkpoint's weights."""
    start("cpu")
    grid = grid_of_one()
    model = build_clip(recipe(run_dir, "unused", {}).model, vision_grid=grid, text_grid=grid)
    load_weights(run_dir, {name: (getattr(model, name), grid) for name in ("vision", "text", "scale")})
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", [*CONTRASTIVE, *MIM])
def test_losses_are_those_of_one_rank(folder: Path, job: Any, layout: str) -> None:
    exact, found = figures(folder / ("one_rank" if layout in CONTRASTIVE else "one_rank_mim")), figures(folder / layout)
    assert [line["step"] for line in found] == [1, 2, 2, 3, 4, 4, 5, 6, 6], "steps, and an evaluation after every other"
    for here, there in zip(found, exact, strict=True):
        assert here.keys() == there.keys()
        # fp32 sums in another order; runs part as the differences feed on themselves.
        tolerance = 1e-5 if here["step"] <= 3 else 1e-4
        for name in here:
            assert here[name] == pytest.approx(there[name], rel=tolerance), (here["step"], name)


@pytest.mark.parametrize("layout", [*CONTRASTIVE, *MIM])
def test_a_resumed_run_repeats_every_figure(folder: Path, job: Any, layout: str) -> None:
    assert figures(folder / f"{layout}_resumed") == figures(folder / layout), "bit for bit"


@pytest.mark.parametrize("layout", CONTRASTIVE)
def test_the_checkpoint_holds_the_weights_after_the_last_step(folder: Path, job: Any, layout: str) -> None:
    end = read_whole(folder / layout)
    for weights, _ in job:
        assert weights[layout].keys() == end.keys()
        for name, value in end.items():
            assert torch.equal(weights[layout][name], value), name
    for name, exact in read_whole(folder / "one_rank").items():
        assert (end[name] - exact).norm() <= 1e-4 * exact.norm(), name


def test_a_run_continues_on_another_layout(folder: Path, job: Any) -> None:
    for here, there in zip(figures(folder / "moved"), figures(folder / "one_rank"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4) if "loss" in here else here == there


def test_stages_hand_their_weights_on_to_tensor_parallel_ranks(job: Any) -> None:
    for weights, begun in job:
        assert begun.keys() == weights["pp2"].keys()
        for name, value in begun.items():
            assert torch.equal(value, weights["pp2"][name]), name


def test_one_process_evaluates_a_run_of_two(
    folder: Path, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate_run(folder / "pp2_vpp2_overlap", [], tmp_path)
    assert results == json.loads((folder / "pp2_vpp2_overlap" / "eval.json").read_text())
    assert "the run's own needs a multiple of 2 processes, these are 1" in capsys.readouterr().out
