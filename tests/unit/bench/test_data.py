"""`megaeva bench data`: its photographs, the check that both sides do the same work, and what it prints."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling
from typer.testing import CliRunner

from megaeva import cli
from megaeva.bench import data, photos
from megaeva.bench.command import find_model
from megaeva.bench.compare import Comparison
from megaeva.config.schema import Config
from megaeva.data.shards import read_shard
from megaeva.data.transforms import reduced_scale, train_crop
from megaeva.errors import UserError

MODEL = find_model("EVA02-CLIP-B-16")


@pytest.fixture(autouse=True)
def signal_handler() -> Iterator[None]:
    """Takes torch's handler of dead workers back, which the peer's DataLoader leaves behind for the whole process."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)
    signal_handling._SIGCHLD_handler_set = False


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return photos.photo_shards(tmp_path_factory.mktemp("bench") / "photos", num_shards=1, samples_per_shard=32)


def recipe(shards: list[Path], variant: str = "EVA02-CLIP-B-16") -> Config:
    return data.recipe(find_model(variant), shards, batch_size=4, num_workers=1)


def test_photographs_are_like_laions(shards: list[Path]) -> None:
    assert len(shards) == photos.NUM_COPIES
    samples = list(read_shard(shards[0]))
    assert [s.files for s in read_shard(shards[-1])] == [s.files for s in samples]
    pictures = [Image.open(io.BytesIO(sample.files["jpg"])) for sample in samples]
    assert all(max(picture.size) == 512 for picture in pictures)
    assert len({picture.size for picture in pictures}) >= 4
    mean_bytes = sum(len(sample.files["jpg"]) for sample in samples) / len(samples)
    assert 30_000 < mean_bytes < 90_000
    assert len({sample.files["txt"] for sample in samples}) == len(samples) == 32


def test_photographs_are_written_once(shards: list[Path]) -> None:
    written = shards[0].stat().st_mtime_ns
    assert photos.photo_shards(shards[0].parent) == shards
    assert shards[0].stat().st_mtime_ns == written
    assert list(shards[0].parent.parent.iterdir()) == [shards[0].parent]


def test_a_missing_photograph_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_SOURCES", (("sklearn", "datasets/images/none.jpg"), ("no_package", "x.jpg")))
    with pytest.raises(UserError, match=r"none\.jpg of the package sklearn is not there.*pip install"):
        photos.photo_shards(tmp_path / "photos")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14-336"])
def test_both_sides_do_the_same_work(shards: list[Path], variant: str) -> None:
    max_levels, mean_levels = data.compare_work(recipe(shards, variant))
    assert 0 < mean_levels < data.MAX_MEAN_LEVELS
    assert max_levels < 16


def test_other_work_is_noticed(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(data.PillowDecoder):
        def decode(self, images, crops):  # type: ignore[no-untyped-def]
            return super().decode(images, [c._replace(left=c.left + 1, width=c.width - 1) for c in crops])

    with monkeypatch.context() as patched:
        patched.setattr(data, "PillowDecoder", Moved)
        with pytest.raises(AssertionError):
            data.compare_work(recipe(shards))
    monkeypatch.setattr(data.Tokenizer, "__call__", lambda self, captions: torch.zeros(len(captions), 77).long())
    with pytest.raises(AssertionError):
        data.compare_work(recipe(shards))


def test_crops_of_512_pixels_are_decoded_at_full_scale(shards: list[Path]) -> None:
    """At half scale they would be less than twice as large as the output."""
    crop = train_crop(np.random.default_rng(0), 512, 512, recipe(shards).data.augment, 224)
    assert reduced_scale(*crop[2:6]) == 1


@pytest.mark.slow
def test_a_short_run(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "photo_shards", lambda: shards)
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 8)
    monkeypatch.setattr(data, "NUM_BATCHES", 2)
    times = data.benchmark_data(MODEL, batch_size=4, num_workers=1, num_rounds=2)
    assert len(times.timed.ours_ms) == len(times.timed.peer_ms) == 2
    assert min(*times.timed.ours_ms, *times.timed.peer_ms) > 0


def test_the_command_prints_images_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    times = data.DataTimes(64, Comparison((40.0, 50.0, 64.0), (80.0, 100.0, 64.0)), 2.0, 0.003)
    monkeypatch.setattr(data, "benchmark_data", lambda *_, **__: times)
    result = CliRunner().invoke(cli.app, ["bench", "data", "--rounds", "3"])
    assert result.exit_code == 0, result.output
    command, sentence, row = result.stdout.splitlines()
    assert command == ("megaeva bench data --peer webdataset --model EVA02-CLIP-B-16 --batch 64 --workers 2 --rounds 3")
    assert "our loader 1280 images/s, webdataset and Pillow 800 images/s, ours / peer 2 (1-2)" in sentence
    assert f"| `{command}` | 1280 | 800 | 2 (1-2) |" in row
