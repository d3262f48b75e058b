"""Whole runs on synthetic shards, in real processes: bit-exact resume, signals, and what bad input says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from tests.helpers.spawn import TrainingProcess

TINY_VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 64,
    "activation": "gelu", "qkv_bias": "qkv", "drop_path": 0.2,
}  # fmt: skip
TINY_TEXT = {"context_length": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64}
TOTAL_STEPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, num_shards=4, samples_per_shard=20, image_size=40, seed=0)
    return str(folder / "*.tar")


def write_recipe(folder: Path, shards: str, **other: object) -> Path:
    recipe = {
        "task": "contrastive",
        "run_dir": str(folder / "run"),
        "platform": "cpu",
        "model": {"embed_dim": 16, "vision": TINY_VISION | {"patch_dropout": 0.25}, "text": TINY_TEXT},
        "data": {"train": [shards], "shuffle_buffer": 16, "augment": {"scale": [0.5, 1.0]}},
        "optim": {"vision": {"lr": 1e-3}, "warmup_steps": 2, "clip_grad_norm": 1.0},
        "train": {
            "total_samples": 8 * TOTAL_STEPS, "global_batch_size": 8, "micro_batch_size": 4,
            "precision": "fp32", "log_every_steps": 1,
        },
        "save": {"every_steps": 3, "keep": 2},
    } | other  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, *arguments: str) -> TrainingProcess:
    return TrainingProcess([str(recipe), *arguments], recipe.parent)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (metrics := read_metrics(run_dir)) and metrics[-1]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached")


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {int(line["step"]): (line["loss"], line["grad_norm"]) for line in read_metrics(run_dir)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: str) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    # As torchrun starts a rank; the others are forked.
    command = [sys.executable, "-m", "megaeva.train", str(write_recipe(folder, shards))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"plan: at most " in done.stdout
    assert json.loads((folder / "run" / "finished.json").read_text())["samples"] == 8 * TOTAL_STEPS
    result = losses(folder / "run")
    assert list(result) == list(range(1, TOTAL_STEPS + 1))
    return result


@pytest.mark.parametrize("kill_at", [[2], [4, 9]], ids=["before_first_save", "twice"])
def test_killed_and_resumed_run_repeats_every_loss(
    tmp_path: Path, shards: str, uninterrupted: dict[int, tuple[float, float]], kill_at: list[int]
) -> None:
    recipe = write_recipe(tmp_path, shards)
    for number, step in enumerate(kill_at):
        process = start(recipe, *(["--resume"] if number else []))
        wait_for_step(tmp_path / "run", step)
        process.kill(signal.SIGKILL)
        assert process.finish()[0] == -signal.SIGKILL
    code, out, err = start(recipe, "--resume").finish()
    assert code == 0, out + err
    assert losses(tmp_path / "run") == uninterrupted


def test_sigterm_saves_and_says_so(tmp_path: Path, shards: str, uninterrupted: dict[int, tuple[float, float]]) -> None:
    recipe = write_recipe(tmp_path, shards, save={"every_steps": None, "keep": 1})
    process = start(recipe)
    wait_for_step(tmp_path / "run", 2)
    process.kill(signal.SIGTERM)
    code, out, _ = process.finish()
    assert code == 143
    assert "--resume" in out
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    code, out, err = start(recipe, "--resume").finish()
    assert code == 0, out + err
    assert losses(tmp_path / "run") == uninterrupted
    code, out, err = start(recipe, "--resume", "train.total_samples=24").finish()
    assert code == 0, out + err
    assert "no step is left: train.total_samples=24 ends at step 3" in out


def test_features_that_are_not_finite_name_step_rank_samples_and_checkpoint(tmp_path: Path, shards: str) -> None:
    optim = {"vision": {"lr": 1e30}, "warmup_steps": 0}
    code, _, err = start(write_recipe(tmp_path, shards, optim=optim, save={"every_steps": 1})).finish()
    assert code == 2
    assert "Traceback" not in err
    assert re.search(r"error: step \d+: not finite: text_BE on rank 0 in 8 of 8 rows, first in row 0", err), err
    assert "lower the learning rate" in err
    assert "step_00000001" in err, "the last good checkpoint"
    (listed,) = (tmp_path / "run").glob("bad_batch_step_*.json")
    keys = json.loads(listed.read_text())["keys"]
    assert len(keys) == 8
    assert keys[0] in err


def test_a_run_folder_in_use_is_not_overwritten(tmp_path: Path, shards: str) -> None:
    train = {"total_samples": 32, "global_batch_size": 8, "precision": "fp32"}
    recipe = write_recipe(tmp_path, shards, train=train)
    code, out, err = start(recipe).finish()
    assert code == 0, out + err
    code, _, err = start(recipe).finish()
    assert code == 2
    assert "--resume" in err
    code, _, err = start(recipe, "--resume", "model.vision.hidden_size=48").finish()
    assert code == 2
    assert "hidden_size" in err
    assert "Traceback" not in err
