"""A run with an average of its weights (EMA), and a run on a locked tower (LiT), through the commands of a user."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from megaeva import cli
from megaeva.checkpoint.average import AveragedReader
from megaeva.checkpoint.layout import find_checkpoint, remove
from megaeva.checkpoint.torch_dist import Reader
from megaeva.data.synthetic import make_shards
from megaeva.eval import run as eval_run
from megaeva.observability.metrics import read_metrics
from megaeva.train import main as train
from tests.helpers.trainer_recipe import model, trainer_recipe

HELDOUT = "retrieval/heldout"
MODEL = model(vision_layers=1, text_layers=1)
# So that open_clip can hold it.
MODEL["vision"] |= {"ln_pre": True, "patch_bias": False, "norm_epsilon": 1e-5, "ffn_hidden_size": 64}


def recipe(folder: Path, name: str, **sections: Any) -> str:
    """Four steps, the first two of which are saved and measured too."""
    cfg = trainer_recipe(
        folder,
        name,
        4,
        **{
            "model": MODEL,
            "optim": {"vision": {"lr": 3e-3}, "ema_decay": 0.5},
            "save": {"every_steps": 2, "keep": 9},
            "eval": {"retrieval": {"heldout": {"shards": [str(folder / "shards" / "*.tar")]}}, "every_steps": 2},
        }
        | sections,
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    return str(path)


def without_steps_after(folder: Path, source: str, name: str, step: int) -> None:
    shutil.copytree(folder / source, folder / name)
    for checkpoint in (folder / name / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def everything(reader: Reader) -> dict[str, Tensor]:
    return {name: reader.read(name) for name in reader.infos}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run that keeps an average, `averaged`."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "shards", num_shards=2, samples_per_shard=20, image_size=40, seed=0)
    assert train([recipe(folder, "averaged")]) == 0
    return folder


def test_both_are_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((home / "averaged" / "eval.json").read_text())
    assert list(found) == [HELDOUT, f"ema/{HELDOUT}"]
    measured = [line["step"] for line in read_metrics(home / "averaged") if f"ema/{HELDOUT}/mean_recall" in line]
    assert measured == [2, 4]
    output = home / "measured"
    for flags, name in ((["--ema"], f"ema/{HELDOUT}"), ([], HELDOUT)):
        assert not (output / "predictions.json").exists()
        assert eval_run.main([str(home / "averaged"), "--output", str(output), *flags]) == 0
        assert name in capsys.readouterr().out
    assert json.loads((output / "eval.json").read_text()) == found


def test_a_checkpoint_that_is_deleted_before_it_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "averaged", home / "going on")

    def agreed_path(path: Path) -> Path:
        found = find_checkpoint(path)
        remove(found)
        return found

    monkeypatch.setattr("megaeva.checkpoint.weights.agreed_path", agreed_path)
    assert eval_run.main([str(home / "going on")]) == 2
    told = capsys.readouterr().err
    assert "step_00000004 is not there, or not any more" in told and "run the command again" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("before", "averaged", "after"),
    [
        ("{}", True, {"ema/a": 1}),
        ('{"b": 2, "a": 3, "ema/b": 4}', True, {"b": 2, "a": 3, "ema/a": 1}),
        ('{"b": 2, "a": 3, "ema/b": 4}', False, {"a": 1, "ema/b": 4}),
        ('{"b": 2, "a', False, {"a": 1}),
        ("[1]", False, {"a": 1}),
    ],
)
def test_figures_of_the_other_weights_stay(tmp_path: Path, before: str, averaged: bool, after: dict[str, int]) -> None:
    path = tmp_path / "eval.json"
    path.write_text(before)
    results: Any = {"ema/a" if averaged else "a": 1}
    kept = eval_run._write_results(path, results, averaged=averaged)
    written = json.loads(path.read_text())
    assert written == after and kept == [name for name in after if name not in results]
    assert [*written] == [*after]


def test_a_resumed_run_has_the_same_average(home: Path) -> None:
    without_steps_after(home, "averaged", "resumed", 2)
    assert train([recipe(home, "resumed"), "--resume"]) == 0
    last, resumed = (everything(Reader(find_checkpoint(home / name))) for name in ("averaged", "resumed"))
    assert same(last, resumed)
    assert sum(name.startswith("optimizer.state.ema.") for name in last) == sum("exp_avg." in name for name in last) > 0


def test_a_run_begins_its_average_where_it_is_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipe(home, "begun", optim={"vision": {"lr": 3e-3}})
    assert train([text]) == 0
    assert "average" not in capsys.readouterr().out
    without_steps_after(home, "begun", "continued", 2)
    assert train([text, "--resume", f"run_dir={home / 'continued'}", "optim.ema_decay=0.5"]) == 0
    assert "the average of the weights begins as a copy of them: the checkpoint has none" in capsys.readouterr().out
    before, after = (Reader(home / "continued" / "checkpoints" / f"step_0000000{step}") for step in (2, 4))
    name = "text.head.weight"
    assert not torch.equal(after.read(f"optimizer.state.ema.{name}"), before.read(name))
    assert not torch.equal(after.read(f"optimizer.state.ema.{name}"), after.read(name))


def test_conversion_of_the_average(home: Path) -> None:
    checkpoint = find_checkpoint(home / "averaged")
    code, output = run("convert", home / "averaged", home / "ours", "--to", "megaeva", "--ema")
    assert code == 0, output
    averages, written = AveragedReader(checkpoint), Reader(home / "ours")
    assert same({name: averages.read(name) for name in averages.weights}, everything(written))
    assert not torch.equal(averages.read("text.head.weight"), Reader(checkpoint).read("text.head.weight"))
    for source, expected in (
        (
            home / "ours",
            f"{home / 'ours'} has no averaged weights; it must be of a run that keeps them; leave --ema out",
        ),
        (home / "averaged.yaml", f"{home / 'averaged.yaml'} is no run, so it has no averaged weights"),
    ):
        code, output = run("convert", source, home / "wrong", "--to", "megaeva", "--ema")
        assert code == 2
        assert expected in output
    assert eval_run.main([str(home / "averaged"), "--ema", f"eval.retrieval.x.shards=[{home}/shards/*.tar]"]) == 0


@pytest.mark.exhaustive
def test_what_is_converted_is_checked_against_the_average(home: Path) -> None:
    code, output = run("convert", home / "averaged", home / "open_clip", "--to", "open_clip", "--ema", "--check")
    assert code == 0, output
    assert "text:" in output and "differ by" in output


def test_a_locked_tower_is_saved_and_resumed_as_it_was(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"vision": {"lr": 3e-3}, "frozen": ["vision"], "ema_decay": 0.5}
    shutil.copytree(home / "averaged", home / "source")
    text = recipe(home, "locked", optim=optim, init={"vision": str(home / "source")})
    assert train([text]) == 0
    assert "vision frozen: " in " ".join(capsys.readouterr().out.split())
    start, locked = (everything(Reader(find_checkpoint(home / name))) for name in ("averaged", "locked"))
    vision = [name for name in start if name.startswith("vision.")]
    assert "vision.head.weight" in vision and all(torch.equal(locked[name], start[name]) for name in vision)
    assert not any(name.startswith("optimizer.") and ".vision." in name for name in locked)
    without_steps_after(home, "locked", "locked again", 2)
    shutil.rmtree(home / "source")  # a resumed run does not need what it started from
    assert train([text, "--resume", f"run_dir={home / 'locked again'}"]) == 0
    started = [json.loads((home / name / "manifest.json").read_text())["starts"] for name in ("locked", "locked again")]
    assert started[0] == started[1] and len(started[0]) == 1
    assert same(locked, everything(Reader(find_checkpoint(home / "locked again"))))
    averages = AveragedReader(find_checkpoint(home / "locked"))
    assert torch.equal(averages.read("vision.head.weight"), start["vision.head.weight"])
