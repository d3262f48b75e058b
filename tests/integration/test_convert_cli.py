"""`megaeva convert` and `megaeva inspect` as a user meets them: what is printed, exit codes, no traceback."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megaeva import cli
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.eva import NATIVE
from megaeva.checkpoint.convert.format import formats
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.config.schema import Config, ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.data.synthetic import make_shards
from megaeva.errors import CheckpointError
from megaeva.export import command
from megaeva.export.check import Side, compare
from megaeva.parallel.runtime import start
from megaeva.trainer import Trainer
from tests.helpers.exports import export, random_clip, state_of
from tests.helpers.tiny import tiny
from tests.helpers.trainer_recipe import model, trainer_recipe

ROOT = Path(__file__).parents[2]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def error_of(*arguments: Any) -> str:
    """The message of a command that the user got wrong."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = tiny("EVA02-CLIP-B-16")
    return export(NATIVE, Contents("clip", cfg), state_of(random_clip(cfg)), tmp_path_factory.mktemp("eva") / "b.pt")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A published variant's weights for open_clip, without the configuration."""
    cfg = ModelSection.model_validate(VARIANTS["Demo-Teacher"])
    folder = export(OPEN_CLIP, Contents("clip", cfg), state_of(random_clip(cfg)), tmp_path / "made")
    shutil.move(folder / "open_clip_model.safetensors", tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def lines_of(done: Any) -> list[str]:
    assert done.exit_code == 0, done.output
    return [line for line in done.stdout.splitlines() if line]


def test_there_and_back_with_check(native: Path, tmp_path: Path) -> None:
    lines = lines_of(run("convert", native, tmp_path / "run", "--to", "megaeva", "--check"))
    assert f"{native} (eva) -> {tmp_path / 'run'} (megaeva)" in lines
    vision, text = lines[-2:]
    assert vision.startswith(f"vision: {native} in timm ") and "cosine 1.0000" in vision
    assert text.startswith(f"text: {native} in open_clip ") and "cosine 1.0000" in text
    lines = lines_of(run("convert", tmp_path / "run", tmp_path / "tower", "--to", "timm", "--check"))
    assert lines[-1].startswith(f"vision: {tmp_path / 'tower'} in timm ")
    lines = lines_of(run("convert", tmp_path / "run", tmp_path / "hf", "--to", "hf-eva", "--check"))
    assert lines[-1].startswith(f"text: {tmp_path / 'hf'} is not checked, nothing here runs hf-eva files")
    lines = lines_of(run("convert", tmp_path / "run", tmp_path / "copy", "--to", "megaeva", "--check"))
    assert lines[-1].startswith("nothing to check")


def test_between_two_formats_both_are_checked(bare: Path, tmp_path: Path) -> None:
    lines = lines_of(run("convert", bare, tmp_path / "hf", "--to", "hf-clip", "--check"))
    assert any("taken for Demo-Teacher" in line for line in lines)
    peers = [line.split(" and ")[0] for line in lines[-4:]]
    for tower, peer in zip(("vision", "text", "vision", "text"), peers):
        assert peer.startswith(f"{tower}: ")
    assert [f"{bare} in open_clip" in peer for peer in peers] == [True, True, False, False]
    assert [f"{tmp_path / 'hf'} in transformers" in peer for peer in peers] == [False, False, True, True]
    # Of another size only the destination can be compared.
    lines = lines_of(run("convert", bare, tmp_path / "larger", "--to", "hf-clip", "--image-size", "60", "--check"))
    assert f"{bare} is not compared" in lines[-3]
    assert lines[-2].startswith(f"vision: {tmp_path / 'larger'} in transformers")


def test_check_without_the_other_implementation(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    lines = lines_of(run("convert", native, tmp_path / "run", "--to", "megaeva", "--check"))
    assert [line.rpartition("files: ")[2] for line in lines[-2:]] == [
        "timm is not installed", "open_clip is not installed"
    ]  # fmt: skip


def test_check_sees_other_outputs(native: Path, tmp_path: Path) -> None:
    cfg = tiny("EVA02-CLIP-B-16")
    state = state_of(random_clip(cfg))
    state["text.norm.bias"] = state["text.norm.bias"] + 1e-3
    other = export(NATIVE, Contents("clip", cfg), state, tmp_path / "other.pt")
    lines = compare(Side(native, "eva"), [Side(other, "eva")])
    assert next(lines).startswith(f"vision: {other} in timm ")
    with pytest.raises(CheckpointError, match=r"text: .*other\.pt in open_clip .* they must agree to 1e-04"):
        next(lines)


def test_onnx_is_resized_and_named_like_a_format(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "write_onnx", lambda *arguments: [str(seen.append(arguments) or "done")])
    lines = lines_of(run("convert", native, tmp_path / "out", "--to", "onnx", "--image-size", "24"))
    assert lines == [f"{native} (eva) -> {tmp_path / 'out'} (onnx)", "done"]
    ((source, what, _),) = seen
    assert what.model.vision.image_size == 24
    assert source.infos["vision.pos_embed"].shape == (1, 37, 32)


def test_onnx_on_a_full_disk_names_the_destination(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_onnx", full)
    text = error_of("convert", native, tmp_path / "out", "--to", "onnx")
    assert f"{tmp_path / 'out'} cannot be written (No space left on device); its disk must take" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "onxx"], "format 'onxx' is not known; it must be one of megaeva, eva, eva-mim, "),
        (["--to", "onxx"], "did you mean onnx?"),
        (["--to", "hf_clip"], "did you mean hf-clip"),
        (["--to", "megaeva", "--variant", "EVA02-CLIP-B-61"], "did you mean EVA02-CLIP-B-16"),
        (["--to", "megaeva", "--variant", "EVA02-CLIP-L-14"], "the model given contradicts"),
        (["--to", "megaeva", "--variant", "a", "--model-config", "b"], "leave one out"),
        (["--to", "megaeva", "--model-config", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--to", "megaeva", "--image-size", "15"], "the image must be a whole number of patches; use 12 or 16 px"),
        (["--to", "hf-clip"], "cannot be written as hf-clip"),
        (["--to", "onnx", "--resize", "lanczos"], "'lanczos' is not one of 'upstream', 'timm'"),
    ],
)
def test_mistakes(arguments: list[str], told: str, native: Path, tmp_path: Path) -> None:
    assert told in error_of("convert", native, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["megaeva", "onnx"])
def test_a_missing_file_and_a_destination_that_exists(to: str, native: Path, tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.pt'} does not exist" in error_of(
        "convert", tmp_path / "no.pt", tmp_path / "out", "--to", to
    )
    (tmp_path / "there").mkdir()
    assert f"{tmp_path / 'there'} exists" in error_of("convert", native, tmp_path / "there", "--to", to)
    assert list((tmp_path / "there").iterdir()) == []


def test_help_names_every_format() -> None:
    shown = " ".join(run("convert", "--help").stdout.split())
    for name in ("megaeva", *(form.name for form in formats()), "onnx"):
        assert name in shown


def test_the_script_of_a_checkout() -> None:
    done = subprocess.run([sys.executable, "tools/convert.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "convert [OPTIONS] {SRC} {DST}" in done.stdout


# ---------------------------------------------------------------------------------------------------------- inspect


def test_a_published_variant(bare: Path) -> None:
    lines = lines_of(run("inspect", bare, "--tensors", "--verify"))
    assert "format: open_clip, " in lines[1]
    assert "variants whose tensors these could be: Demo-Teacher" in lines
    assert "configuration beside it: none" in lines
    assert any("48 px in patches of 12, 4 layers of width 96, 4 heads, MLP 384" in line for line in lines)
    assert any(line.split() == ["logit_scale", "float32", "[]"] for line in lines)
    assert lines[-1].startswith("verified: ")


def test_what_is_missing_is_named(native: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(native, tmp_path / "alone.pt"))
    lines = lines_of(run("inspect", alone))
    assert "variants whose tensors these could be: none published" in lines
    assert any(line.startswith("model: not settled. ") for line in lines)
    cfg = tiny("EVA02-CLIP-B-16", num_layers=4)
    (tmp_path / "deeper.yaml").write_text(yaml.safe_dump({"model": cfg.model_dump(mode="json")}))
    shown = run("inspect", alone, "--model-config", tmp_path / "deeper.yaml").stdout
    assert "visual.blocks.3.norm1.weight: missing, must be [32]" in shown


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights of the boxes")
    assert "is no file of weights" in error_of("inspect", tmp_path / "notes.txt")
    assert "does not exist" in error_of("inspect", tmp_path / "nothing")


@pytest.fixture
def trained(tmp_path: Path) -> Config:
    make_shards(tmp_path / "shards", num_shards=1, samples_per_shard=16, image_size=40, seed=0)
    cfg = trainer_recipe(tmp_path, "run", 1, model=model(2, 1), optim={"vision": {"lr": 1e-3}})
    assert Trainer(cfg, start("cpu"), resume=False, recipe_changes=[]).fit() == 0
    return cfg


def test_a_run_and_its_damage(trained: Config) -> None:
    lines = lines_of(run("inspect", trained.run_dir, "--verify"))
    shown = "\n".join(lines)
    assert "a checkpoint of a run: task contrastive, step 1, 8 samples" in shown
    assert "grids: vision tp=1 x pp=1 x vpp=1 x dp=1, text tp=1 x pp=1 x vpp=1 x dp=1" in shown
    assert "optimizer (adamw): " in shown and "torch 2." in shown
    assert lines[-1].endswith("all finite, as their checksums say")
    assert "not explained" not in shown and "missing" not in shown
    (file,) = Path(trained.run_dir).glob("checkpoints/step_*/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert str(file) in error_of("inspect", trained.run_dir, "--verify")
