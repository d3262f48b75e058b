"""The `megaeva` command: quick help, nearest names, errors without tracebacks, exit codes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megaeva import cli
from megaeva.checkpoint.layout import FORMAT, INFO_NAME
from megaeva.config import VARIANTS, load
from megaeva.config.schema import AxesSection, LaunchSection
from megaeva.errors import ConfigError, DataError, UserError

RECIPE = """\
task: contrastive
run_dir: {run_dir}
model: {{variant: ViT-B-16-quickgelu}}
data: {{train: [a.tar]}}
optim: {{vision: {{lr: 1e-3}}}}
train: {{total_samples: 640, global_batch_size: 64}}
"""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(run_dir=tmp_path / "run"), encoding="utf-8")
    return path


def test_no_argument_shows_help_and_the_next_command_in_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "megaeva.cli"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the CPU's clock: a busy machine is not a slow command
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "Next:" in done.stdout
    for command in ("doctor", "demo", "data", "train", "loop", "eval"):
        assert f"  {command} " in done.stdout
    assert min(seconds) < 1


def test_the_command_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, megaeva.cli; print([m for m in ('torch', 'numpy', 'megatron', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trian",), "'train'"),
        (("data", "emojy"), "'emoji'"),
        (("train", "r.yaml", "--proceses", "2"), "--processes"),
        (("loop", "r.yaml", "--seds", "2"), "--seeds"),
    ],
)
def test_misspelt_commands_and_flags_name_the_nearest(arguments: tuple[str, ...], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_version() -> None:
    from megaeva import __version__

    assert run("--version").stdout.strip() == f"megaeva {__version__}"


@pytest.mark.parametrize("command", ["train", "loop"])
def test_a_wrong_recipe_is_told_on_stderr_with_exit_code_2(command: str, tmp_path: Path) -> None:
    result = run(command, str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "none.yaml does not exist" in result.stderr
    assert "Traceback" not in result.output


def test_no_traceback_from_the_real_process(recipe: Path) -> None:
    command = [sys.executable, "-m", "megaeva.cli", "train", str(recipe), "sed=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: sed=1 (command line) is not a known key; did you mean seed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x; y"), 2), (DataError("x; y"), 2), (KeyboardInterrupt(), 130)]
)
def test_what_a_command_raises_becomes_an_exit_code(
    error: BaseException, code: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("megaeva.loop.launch.launch", fail)
    result = run("train", str(recipe))
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("megaeva.loop.launch.launch", fail)
    assert isinstance(run("train", str(recipe)).exception, ZeroDivisionError)


def test_train_launches_what_was_asked(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("megaeva.loop.launch.launch", lambda *given, again: calls.append(given))
    result = run("train", str(recipe), "seed=3", "--processes", "2", "--threads", "1", "train.log_every_steps=1")
    assert result.exit_code == 0
    log = recipe.parent / "run" / "train.log"
    launched = LaunchSection(num_processes=2, threads_per_process=1)
    assert calls == [(recipe, ["seed=3", "train.log_every_steps=1"], launched, log, False)]


def test_train_checks_the_world_and_spares_an_old_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("megaeva.loop.launch.launch", lambda *given, again: calls.append(given))
    result = run("train", str(recipe), "--processes", "3")
    assert result.exit_code == 2
    assert "train.global_batch_size=64 must be a multiple of the 3 processes" in result.stderr
    assert "start 2 or 4 processes" in result.stderr
    (recipe.parent / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    result = run("train", str(recipe))
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert calls == []
    assert run("train", str(recipe), "--resume").exit_code == 0
    assert calls


def test_eval_needs_a_run_folder_and_launches(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("megaeva.loop.launch.run_module", lambda *given, **named: calls.append((given, named)))
    result = run("eval", str(recipe.parent / "nowhere"))
    assert result.exit_code == 2
    assert "nowhere does not exist" in result.stderr
    home = recipe.parent / "run"
    checkpoint = home / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    recipe.rename(home / "config.yaml")
    assert run("eval", str(checkpoint), "eval.resize=squash").exit_code == 0
    (module, arguments, launched, log), _ = calls[0]
    assert module == "megaeva.eval.run"
    of_its_own = home / "eval" / "step_00000010"  # not beside the figures of another step
    assert arguments == [str(checkpoint), "--output", str(of_its_own), "eval.resize=squash"]
    assert (launched.num_processes, log) == (1, of_its_own / "eval.log")
    assert run("eval", str(home)).exit_code == 0
    (_, arguments, *_), _ = calls[1]
    assert arguments == [str(home), "--output", str(home)]


@pytest.mark.parametrize("size", ["inf", "nan", "0"])
def test_convert_takes_no_endless_shards(tmp_path: Path, size: str) -> None:
    result = run("convert", str(tmp_path), str(tmp_path / "new"), "--to", "eva", "--shard-gib", size)
    assert result.exit_code == 2
    assert "Invalid value for '--shard-gib'" in result.stderr


def test_eval_needs_no_more_ranks_than_it_is_given(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("megaeva.loop.launch.run_module", lambda *given, **named: calls.append(given))
    home = recipe.parent / "run"
    home.mkdir()
    layout = "parallel: {vision: {tp: 2, pp: 2, vpp: 2, layers_per_stage: [3, 3, 3, 3]}, text: {tp: 2}}\n"
    (home / "config.yaml").write_text(recipe.read_text(encoding="utf-8") + layout, encoding="utf-8")
    result = run("eval", str(home), "--processes", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    result = run("eval", str(home))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "layout: the run's own needs a multiple of 4 processes, these are 1; each holds whole"
    )
    assert run("eval", str(home), "--processes", "3").exit_code == 0, "a batch of 64 binds training only"
    as_trained, alone, three = (arguments[3:] for _, arguments, *_ in calls)
    assert as_trained == []
    assert alone == three
    cfg = load(home / "config.yaml", alone)
    assert (cfg.parallel.vision, cfg.parallel.text) == (AxesSection(), AxesSection())
    result = run("eval", str(home), "parallel.vision.tp=4")
    assert result.exit_code == 2
    assert "1 process must be a multiple of 8, for parallel.vision.tp=4 x pp=2" in result.stderr


def test_topology_prints_and_starts_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaeva.loop.launch.launch", lambda *_, **__: pytest.fail("launched"))
    (recipe.parent / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)  # an old run is no obstacle
    result = run("train", str(recipe), "--topology", "--processes", "4", "parallel.vision.tp=2", "parallel.vision.pp=2")
    assert result.exit_code == 0, result.output
    assert "vision  0-1    0-5     embeds" in result.stdout
    assert "vision  2-3    6-11    projects" in result.stdout
    result = run("train", str(recipe), "--topology", "--processes", "4", "parallel.vision.tp=8")
    assert result.exit_code == 2


def test_a_teacher_that_cannot_be_cut_is_told_before_the_start(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaeva.loop.launch.launch", lambda *_, **__: None)
    (recipe.parent / INFO_NAME).write_text(
        json.dumps({"format": FORMAT, "model": VARIANTS["ViT-B-16-quickgelu"]}), encoding="utf-8"
    )
    mim = ["task=mim", f"teacher.checkpoint={recipe.parent}", "mim.mask={num_masked: 50, min_block: 16}"]
    result = run("train", str(recipe), *mim, "parallel.teacher.tp=8", "--processes", "8")
    assert result.exit_code == 2
    expected = "parallel.teacher.tp=8 must divide the teacher's num_heads=12; use 1, 2 or 4."
    assert result.stderr == f"error: {expected}\n"
    assert run("train", str(recipe), *mim, "parallel.teacher.tp=4", "--processes", "4").exit_code == 0


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Loops that `megaeva` would have run."""
    ran: list[Any] = []
    monkeypatch.setattr("megaeva.loop.weak_to_strong.run_loop", lambda cfg, path: ran.append((cfg, path)))
    monkeypatch.setattr("megaeva.loop.aggregate.write_aggregate", lambda folders, out: ran.append((folders, out)))
    return ran


def test_loop_over_seeds(loops: list[Any]) -> None:
    demo = cli.repository() / "recipes" / "demo.yaml"
    assert run("loop", str(demo), "--seeds", "0,4", "run_dir=runs/two").exit_code == 0
    assert [(cfg.seed, cfg.run_dir) for cfg, _ in loops[:2]] == [(0, "runs/two/seed_0"), (4, "runs/two/seed_4")]
    assert loops[2] == ([Path("runs/two/seed_0"), Path("runs/two/seed_4")], Path("runs/two/aggregate.json"))
    result = run("loop", str(demo), "--seeds", "a")
    assert result.exit_code == 2
    assert "--seeds 0,1,2" in result.stderr


def test_demo_runs_from_any_folder(loops: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr("megaeva.data.prepare.emoji.prepare_emoji", made.append)
    root = tmp_path / "checkout"
    (root / "recipes").mkdir(parents=True)
    source = cli.repository() / "recipes"
    for name in ("demo.yaml", "demo_teacher.yaml", "demo_mim.yaml", "demo_clip.yaml", "base/demo.yaml"):
        (root / "recipes" / name).parent.mkdir(exist_ok=True)
        (root / "recipes" / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr(cli, "repository", lambda: root)
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert made == [Path("data/emoji")]
    assert Path.cwd() == root
    assert [(cfg.run_dir, path) for cfg, path in loops] == [("runs/demo", Path("recipes/demo.yaml"))]
    # A folder given relative to where the command was typed stays there.
    os.chdir(tmp_path)
    (root / "data" / "emoji").mkdir(parents=True)
    (root / "data" / "emoji" / "index.json").touch()
    assert run("demo", "--run-dir", "mine").exit_code == 0
    assert loops[1][0].run_dir == str(tmp_path / "mine")
    assert len(made) == 1


def test_demo_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "megaeva" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 2
    assert "clone" in result.stderr


def test_data_folder_and_its_mistakes(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    assert run("data", "folder", str(tmp_path / "in"), str(tmp_path / "out")).exit_code == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a black square", encoding="utf-8")
    result = run("data", "folder", str(tmp_path / "in"), str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1


def test_data_check_passes_the_data_parallel_size(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaeva.data.preflight.preflight", lambda cfg, size: f"{cfg.task} on {size}")
    split = ("parallel.vision.tp=2", "parallel.text.tp=4")
    assert run("data", "check", str(recipe), *split, "--processes", "8").stdout == "contrastive on 2\n"


def test_doctor_exit_code_follows_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from megaeva.doctor import Check

    for status, code in (("ok", 0), ("warn", 0), ("error", 1)):
        monkeypatch.setattr("megaeva.doctor.examine", lambda status=status: [Check("x", status, "y", "z")])
        assert run("doctor").exit_code == code


def test_refuse_old_run_lets_a_new_folder_pass(tmp_path: Path) -> None:
    cli.refuse_old_run(tmp_path)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume"):
        cli.refuse_old_run(tmp_path)
