"""Each mistake a user can make ends in one message with exit code 2: in this process, where torch is loaded once.

A rank that dies, and what two ranks print of one mistake, need real processes; those cases are at the end.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

from megaeva.checkpoint import torch_dist
from megaeva.checkpoint.store import CheckpointStore
from megaeva.data.synthetic import make_shards
from megaeva.data.tokenizer import build_subset
from megaeva.observability.metrics import MetricLog, read_metrics
from megaeva.train import main

VISION = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 32,
    "activation": "gelu", "qkv_bias": "qkv",
}  # fmt: skip
TEXT = {"context_length": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 32}
SAMPLES_PER_SHARD = 16

Change = Callable[[str, bytes], tuple[str, bytes] | None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_shards(folder, num_shards=2, samples_per_shard=SAMPLES_PER_SHARD, image_size=64, seed=0)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, good: Path) -> Path:
    content = {
        "task": "contrastive",
        "run_dir": str(tmp_path / "run"),
        "platform": "cpu",
        "model": {"embed_dim": 8, "vision": VISION, "text": TEXT},
        "data": {"train": [f"{good}/*.tar"], "shuffle_buffer": 16},
        "optim": {"vision": {"lr": 1e-3}},
        "train": {"total_samples": 64, "global_batch_size": 16, "precision": "fp32", "log_every_steps": 1},
        "save": {"every_steps": 1, "keep": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rewrite(good: Path, out: Path, change: Change) -> str:
    """The shards of `good` with each member changed, or dropped where `change` gives None; returns their glob."""
    out.mkdir()
    for path in sorted(good.glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(out / path.name, "w") as target:
            for member in source:
                content = source.extractfile(member)
                assert content is not None
                changed = change(member.name, content.read())
                if changed is not None:
                    info = tarfile.TarInfo(changed[0])
                    info.size = len(changed[1])
                    target.addfile(info, io.BytesIO(changed[1]))
    return f"data.train=[{out}/*.tar]"


def fail(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one message that training ends with."""
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in out + err
    messages = [line for line in err.splitlines() if "error: " in line]
    assert len(messages) == 1, err
    return err[err.index("error: ") :]


def checkpoints(recipe: Path) -> list[str]:
    return sorted(path.name for path in (recipe.parent / "run" / "checkpoints").iterdir())


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.total_sampels=8", ["train.total_sampels=8", "not a known key", "did you mean train.total_samples"]),
        ("train.total_samples=many", ['train.total_samples="many"', "must be an integer", "whole number"]),
        ("parallel.vision.tp=3", ["parallel.vision.tp=3", "must divide model.vision.num_heads=2", "use 1."]),
        ("data.train=[nowhere/*.tar]", ["nowhere/*.tar", "must match at least one shard", "mend the path"]),
        ("data.train=[nowhere/0.tar]", ["nowhere/0.tar does not exist", "must be there", "mend the path"]),
        ("data.num_workers=3", ["names 2 shards", "3 in all", "lower data.num_workers"]),
        ("train.precision=fp8", ["train.precision=fp8", "platform=cpu, which has no FP8", "train.fp8.rehearse=true"]),
    ],
)
def test_recipe(recipe: Path, capfd: pytest.CaptureFixture[str], override: str, parts: list[str]) -> None:
    message = fail(capfd, recipe, override)
    assert all(part in message for part in parts), message
    assert not (recipe.parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["vocab.json does not exist", "megaeva data emoji"]),
        ('{"clip_ids": [1, 2', ["vocab.json cannot be read", "must be JSON"]),
        (
            json.dumps(build_subset(["a cat"])),
            [" tokens, model.text.vocab_size=300 must be at least as many", "raise it"],
        ),
    ],
    ids=["missing", "cut short", "larger than the model"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_vocabulary(
    recipe: Path, capfd: pytest.CaptureFixture[str], text: str | None, parts: list[str], workers: int
) -> None:
    path = recipe.parent / "vocab.json"
    if text:
        path.write_text(text)
    overrides = ("model.text.vocab_size=300", f"data.num_workers={workers}")
    message = fail(capfd, recipe, f"data.tokenizer_subset={path}", *overrides)
    assert all(part in message for part in parts), message


def test_recipe_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = fail(capfd, tmp_path / "nope.yaml")
    assert "nope.yaml does not exist" in message


# --------------------------------------------------------------------------------------------------------- layouts

# Name: (processes, overrides, what the message says).
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    "text_heads": (
        2, "parallel.text.tp=3",
        ["parallel.text.tp=3 (command line) must divide model.text.num_heads=2", "; use 1 or 2."],
    ),
    "stages_without_a_layer": (
        2, "parallel.vision.pp=2",
        ["parallel.vision.pp=2 (command line) must leave each of the pp=2 x vpp=1 = 2 stages a layer",
         "model.vision.num_layers=1; use parallel.vision.pp=1."],
    ),
    "layers_per_stage": (
        2, "model.vision.num_layers=4 parallel.vision.pp=2 parallel.vision.layers_per_stage=[1,2]",
        ["parallel.vision.layers_per_stage=[1, 2]", "2 entries that sum to model.vision.num_layers=4", "use [2, 2]"],
    ),
    "pipeline_of_the_text": (2, "parallel.text.pp=2", ["parallel.text.pp=2", "must be 1", "raise parallel.text.tp"]),
    "microbatches_of_the_batch": (
        1, "train.micro_batch_size=3", ["train.micro_batch_size=3", "must divide train.global_batch_size=16; use 2."]
    ),
    "microbatches_of_a_rank": (
        2, "train.micro_batch_size=16",
        ["train.micro_batch_size=16 must divide the 8 samples of a vision data rank", "use train.micro_batch_size=8"],
    ),
    "microbatches_of_virtual_stages": (
        4, "model.vision.num_layers=8 parallel.vision.pp=4 parallel.vision.vpp=2 train.micro_batch_size=8",
        ["train.micro_batch_size=8 cuts the 16 samples of a vision data rank into 2", "a multiple of",
         "parallel.vision.pp=4; use train.micro_batch_size=4, or parallel.vision.vpp=1, or"],
    ),
    "world": (
        3, "parallel.vision.tp=2",
        ["3 processes must be a multiple of 2, for parallel.vision.tp=2 and parallel.text.tp=1",
         "; start 2 or 4 processes."],
    ),
    "batch_of_the_loss": (
        3, "",
        ["train.global_batch_size=16 must be a multiple of the 3 processes", "start 2 or 4 processes",
         "use train.global_batch_size=15, or train.global_batch_size=18"],
    ),
    "teacher_of_a_clip": (2, "parallel.teacher.tp=2", ["parallel.teacher", "must be absent in task=contrastive"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_is_refused_before_torch_is_loaded(recipe: Path, case: str) -> None:
    processes, overrides, parts = LAYOUTS[case]
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); import megaeva.cli as c; c.main()"
    )
    command = [sys.executable, "-c", code, "train", str(recipe), *overrides.split(), "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "False\n", "a process group would need torch"
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    assert not (recipe.parent / "run").exists()


# ------------------------------------------------------------------------------------------------------------ data


def _bomb() -> bytes:
    encoded = io.BytesIO()
    Image.new("1", (9000, 9000)).save(encoded, "PNG")
    return encoded.getvalue()


BOMB = _bomb()
FIRST = "00000000"
# Name: (what becomes of a member, the reason it is counted by).
BROKEN: dict[str, tuple[Change, str]] = {
    "no_caption": (lambda name, data: None if name.endswith(".txt") else (name, data), "missing_caption"),
    "truncated": (lambda name, data: (name, data[:-200] if name.endswith(".jpg") else data), "truncated_image"),
    "bomb": (
        lambda name, data: (name.replace(".jpg", ".png"), BOMB) if name.endswith(".jpg") else (name, data),
        "more pixels than data.max_image_pixels",
    ),
    "not_utf8": (lambda name, data: (name, b"caf\xe9" if name.endswith(".txt") else data), "not UTF-8"),
    "dots": (lambda name, data: ("../../" + name, data), "`..`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_shards_of_broken_samples(
    recipe: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    change, reason = BROKEN[case]
    message = fail(capfd, recipe, rewrite(good, tmp_path / case, change))
    assert reason in message
    assert FIRST[:-2] in message, "the first keys"
    assert "must" in message or "may be" in message
    assert not list(tmp_path.parent.glob("*.jpg")), "nothing is written under a member's name"


@pytest.mark.parametrize("case", BROKEN)
def test_one_broken_sample_is_skipped(
    recipe: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    change, _ = BROKEN[case]
    shards = rewrite(good, tmp_path / case, lambda n, data: change(n, data) if n.startswith(FIRST) else (n, data))
    code = main([str(recipe), shards, "data.max_dropped_share=0.2", "save.every_steps=null"])
    out, err = capfd.readouterr()
    assert code == 0, out + err
    assert "Traceback" not in err


def test_a_limit_passed_in_mid_run_loses_no_step(
    recipe: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, _ = BROKEN["not_utf8"]
    shards = rewrite(good, tmp_path / "x", lambda n, data: change(n, data) if n.startswith(FIRST) else (n, data))
    message = fail(capfd, recipe, shards, "save.every_steps=null", "data.max_dropped_share=0.01")
    assert "1 of " in message
    (saved,) = checkpoints(recipe)
    assert saved == "step_00000001", "32 samples with one broken are one batch of 16 and an unfinished one"
    assert main([str(recipe), shards, "data.max_dropped_share=0.2", "--resume"]) == 0


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (bytes(10240), "is empty"), (b"no tar" * 500, "must be a tar file")]
)
def test_shard_that_holds_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    message = fail(capfd, recipe, f"data.train=[{tmp_path}/0.tar]")
    assert words in message
    assert "0.tar" in message
    assert "write it again or take it off the list" in message


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_full_disk_leaves_the_last_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    close, calls = torch_dist.FileWriter.close, []

    def full_the_second_time(self: torch_dist.FileWriter) -> torch_dist.FileIndex:
        calls.append(self)
        if len(calls) == 2:
            self.abort()
            raise OSError(28, os.strerror(28))
        return close(self)

    monkeypatch.setattr(torch_dist.FileWriter, "close", full_the_second_time)
    message = fail(capfd, recipe)
    for part in ("step_00000002", "No space left on device", "free space", "untouched", "step_00000001"):
        assert part in message
    assert checkpoints(recipe) == ["step_00000001"], "nothing half-written is left"
    assert main([str(recipe), "--resume"]) == 0
    assert checkpoints(recipe) == ["step_00000003", "step_00000004"]


def test_a_save_in_flight_is_finished_when_the_loss_is_not_finite(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    close = torch_dist.FileWriter.close

    def slowly(self: torch_dist.FileWriter) -> torch_dist.FileIndex:
        time.sleep(0.5)
        return close(self)

    monkeypatch.setattr(torch_dist.FileWriter, "close", slowly)
    message = fail(capfd, recipe, "optim.vision.lr=1e30", "optim.warmup_steps=0", "train.total_samples=1600")
    step = int(message.removeprefix("error: step ").partition(":")[0])
    last = f"step_{step:08d}"
    assert checkpoints(recipe)[-1] == last
    assert f"Last good checkpoint: {recipe.parent}/run/checkpoints/{last}; --resume continues there" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("train.precision=fp16 train.fp16.initial_scale=4294967296 train.fp16.min_scale=4294967296", "scale collapses"),
        ("optim.vision.lr=1e30 optim.warmup_steps=0", "finite"),
    ],
)
def test_a_stop_before_the_first_save_speaks_of_no_resume(
    recipe: Path, capfd: pytest.CaptureFixture[str], overrides: str, words: str
) -> None:
    message = fail(capfd, recipe, "save.every_steps=null", *overrides.split())
    assert words in message
    assert "No checkpoint was saved." in message and "--resume" not in message


def test_the_command_prints_one_error(recipe: Path) -> None:
    """What the launcher adds to a rank's own words is no second error."""
    code = "from megaeva.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), "init.vision=nowhere.safetensors"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 2, done.stdout
    lines = done.stdout.splitlines()
    assert [line.startswith("error: ") for line in lines[-2:]] == [True, False], done.stdout
    assert done.stdout.count("error: ") == 1
    assert lines[-1] == f"stage train stopped by the error above (log: {recipe.parent}/run/train.log)"
    assert "--resume" not in done.stdout


def test_full_disk_under_the_metrics(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28), "metrics.jsonl")

    monkeypatch.setattr("megaeva.observability.metrics.MetricLog.write", full)
    message = fail(capfd, recipe)
    assert "metrics.jsonl: No space left on device" in message
    assert "must have space" in message


def test_a_folder_in_the_place_of_a_file(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "run" / "metrics.jsonl").mkdir(parents=True)
    message = fail(capfd, recipe)
    assert "metrics.jsonl: Is a directory" in message and "move away what has this one" in message


def test_metrics_are_on_the_disk_before_a_checkpoint(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint outlives a machine that fails; so must the lines of its steps, which no resumed run makes again."""
    on_disk: list[int] = []
    flush, begin = MetricLog.flush, CheckpointStore.begin

    def flushed(log: MetricLog) -> None:
        flush(log)
        on_disk[:] = [int(line["step"]) for line in read_metrics(log.path.parent)]

    def begun(store: CheckpointStore, step: int, *arguments: Any, **named: Any) -> Any:
        assert on_disk == list(range(1, step + 1))
        return begin(store, step, *arguments, **named)

    monkeypatch.setattr(MetricLog, "flush", flushed)
    monkeypatch.setattr(CheckpointStore, "begin", begun)
    assert main([str(recipe)]) == 0
    assert on_disk == [1, 2, 3, 4]


def test_resume_into_another_model_changes_nothing(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "train.total_samples=16"]) == 0
    run = recipe.parent / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capfd.readouterr()
    message = fail(capfd, recipe, "--resume", "model.vision.hidden_size=32")
    for part in ("model.vision.hidden_size: checkpoint 16, recipe 32", "must have the same", "set these keys back"):
        assert part in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ------------------------------------------------------------------------------------------------------- two ranks


def start_two_ranks(recipe: Path, *overrides: str) -> "subprocess.Popen[str]":
    # The command is run as a user runs it, so that what torchrun adds is seen too.
    code = "import sys; from megaeva.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), *overrides, "--processes", "2", "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_ranks_tell_a_mistake_once(recipe: Path) -> None:
    process = start_two_ranks(recipe, "data.num_workers=2")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2, out
    lines = out.splitlines()
    assert len(lines) == 2, out
    assert "names 2 shards" in lines[0]
    assert lines[0].startswith("error: ") and lines[1].startswith("stage train stopped by the error above")


def test_rank_that_is_killed_is_named_and_the_rest_stops(recipe: Path) -> None:
    process = start_two_ranks(recipe, "train.total_samples=16000000", "save.every_steps=20", "train.log_every_steps=10")
    try:
        saved = recipe.parent / "run" / "checkpoints"
        deadline = time.monotonic() + 60
        while not list(saved.glob("step_*")):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.1)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
        killed_at = time.monotonic()
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - killed_at < 60
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    assert process.returncode == 1, out
    assert "Traceback" not in out
    assert "rank 1 was killed by SIGKILL" in out.splitlines()[-2], out
    assert "--resume" in out.splitlines()[-1]
    newest = sorted(saved.glob("step_*"))[-1]
    assert (newest / "megaeva.json").exists()
    shutil.rmtree(saved)
