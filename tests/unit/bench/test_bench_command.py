"""`megaeva bench` and tools/benchmark.py: what they run and how they refuse."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
from typer.testing import CliRunner

from megaeva import cli
from megaeva.bench.command import find_model
from megaeva.config.variants import OPEN_CLIP_NAMES, VARIANTS

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("stepp",), "'step'"),
        (("step", "--per", "plain"), "--peer"),
        (("step", "--peer", "plainn"), "'plain'"),
        (("step", "--model", "EVA02-CLIP-B16"), "did you mean EVA02-CLIP-B-16"),
        (("step", "--model", "EVA02-B16"), "did you mean EVA02-B-16"),
        (("step", "--peer", "open_clip", "--model", "EVA-CLIP-8B"), "open_clip has no such model"),
        (("step", "--peer", "open_clip", "--part", "text"), "use --part both"),
        (("step", "--peer", "padded", "--part", "vision"), "--part vision has no captions"),
        (("step", "--optimizer", "lamb"), "--profile"),
        (("step", "--profile", "--model", "EVA02-CLIP-B16"), "did you mean EVA02-CLIP-B-16"),
        (("fp8", "--precisions", "fp32,fp8_delayed"), "bf16 among them"),
        (("fp8", "--precisions", "bf16,fp8_mxfp8"), "some of bf16, fp32, fp8_delayed, fp8_current"),
        (("fp8", "--seeds", "0;1"), "--seeds 0;1"),
        (("normalize-pack", "--num-sample", "8"), "--num-samples"),
        (("data", "--peer", "plain"), "'plain'"),
        (("data", "--model", "EVA02-CLIP-B16"), "did you mean EVA02-CLIP-B-16"),
        (("data", "--workers", "0"), "--workers"),
        (("convert", "--model", "EVA02-CLIP-B16"), "did you mean EVA02-CLIP-B-16"),
        (("sweep", "r.yaml", "--ranks", "1;2"), "--ranks 1;2 must be whole numbers"),
        (("sweep", "r.yaml", "--peak-tflops", "0"), "--peak-tflops 0 must be above 0"),
        (("sweep", "r.yaml", "--peak-tflops", "inf"), "--peak-tflops inf must be above 0 and finite"),
    ],
)
def test_what_cannot_be_run_is_explained(arguments: tuple[str, ...], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_step_prints_its_command_and_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.tiny import tiny

    monkeypatch.setattr("megaeva.bench.command.find_model", tiny)
    result = run("step", "--batch", "3", "--rounds", "2", "--part", "vision")
    assert result.exit_code == 0, result.output
    command, *_, row = result.stdout.splitlines()
    assert command == (
        "megaeva bench step --peer plain --model EVA02-CLIP-B-16 --batch 3 --precision fp32 --part vision "
        "--rounds 2 --threads 1"
    )
    assert f"| `{command}` |" in row


def test_the_tool_is_the_command() -> None:
    command = [sys.executable, "tools/benchmark.py", "normalize-pack", "--num-samples", "4", "--embed-dim", "3"]
    done = subprocess.run([*command, "--rounds", "2"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "no native operator is built" in done.stderr:
        assert done.returncode == 2
        pytest.skip("the extension is not built")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [8, 8]
    assert "normalize_pack forward, B=4 E=3 float32 cpu" in rows[0]


def test_open_clips_names_are_understood_and_known_to_open_clip() -> None:
    assert find_model("EVA02-B-16") == find_model("EVA02-CLIP-B-16")
    assert find_model("ViT-B-16").variant == "ViT-B-16"
    assert set(OPEN_CLIP_NAMES) <= set(VARIANTS)
    assert set(OPEN_CLIP_NAMES.values()) <= set(open_clip.list_models())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("step", "--peer", "open_clip"), "--peer open_clip needs open_clip"),
        (("loss", "--batch", "16"), "--peer open_clip needs open_clip"),
        (("data",), "--peer webdataset needs open_clip"),
    ],
)
def test_open_clip_must_be_installed(
    arguments: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr and "pip install 'megaeva[eval]'" in result.stderr


@pytest.mark.slow  # starts four processes
def test_convert_measures_both_ways_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.tiny import tiny

    monkeypatch.setattr("megaeva.bench.command.find_model", tiny)
    model = "EVA02-CLIP-bigE-14-plus"
    result = run("convert", "--rounds", "1", "--folder", str(tmp_path / "scratch"))
    assert result.exit_code == 0, result.output
    command, first, first_row, second, second_row, *planned = result.stdout.splitlines()
    assert command == f"megaeva bench convert --model {model} --rounds 1"
    for name, sentence, row in (("eva -> megaeva", first, first_row), ("megaeva -> hf-eva", second, second_row)):
        assert sentence.startswith(f"{name}: 0.00 GB in") and "peak resident memory 0." in sentence
        assert f"| {name}, `{command}` |" in row
    assert len(planned) == 2 and all("planned: EVA-CLIP-18B in half precision, 36.65 GB" in line for line in planned)
    assert list((tmp_path / "scratch").iterdir()) == []
