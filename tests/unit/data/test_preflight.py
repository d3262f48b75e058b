"""The look at the first shard."""

import io
import tarfile
from pathlib import Path

import pytest

from megaeva.data.preflight import preflight
from megaeva.data.synthetic import make_shards
from megaeva.errors import DataError
from tests.helpers.data_recipe import data_recipe


def rewrite(source: Path, target: Path, keep: str) -> Path:
    """A copy of `source` with the members that end in `keep` only."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            if member.name.endswith(keep):
                content = old.extractfile(member)
                assert content
                new.addfile(member, io.BytesIO(content.read()))
    return target


def test_it_names_keys_sizes_and_a_caption(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, num_shards=3, samples_per_shard=5, image_size=40)
    report = preflight(data_recipe(f"{tmp_path}/*.tar"), data_size=2)
    for part in (
        "3 shards",
        str(paths[0]),
        "jpg x 5",
        "txt x 5",
        "no broken sample",
        "000000/00000000",
        "40 x 40",
        "'a ",
    ):
        assert part in report
    assert 2 <= len(report.splitlines()) <= 3


def test_shards_without_captions(tmp_path: Path) -> None:
    (source,) = make_shards(tmp_path, num_shards=1, samples_per_shard=5)
    path = rewrite(source, tmp_path / "silent.tar", ".jpg")
    message = (
        r"silent\.tar: none of its first 5 .*5 missing_caption \(first: silent/00000000\); members: jpg x 5; .*txt"
    )
    with pytest.raises(DataError, match=message):
        preflight(data_recipe(path), 1)
    assert "captions are not used" in preflight(data_recipe(path, task="mim"), 1)


def test_shards_without_images(tmp_path: Path) -> None:
    (source,) = make_shards(tmp_path, num_shards=1, samples_per_shard=5)
    path = rewrite(source, tmp_path / "blind.tar", ".txt")
    with pytest.raises(DataError, match=r"5 missing_image.*members: txt x 5"):
        preflight(data_recipe(path, task="mim"), 1)


def test_missing_empty_and_too_few(tmp_path: Path) -> None:
    make_shards(tmp_path, num_shards=2, samples_per_shard=2)
    with pytest.raises(DataError, match=r"absent\.tar does not exist"):
        preflight(data_recipe(tmp_path / "absent.tar"), 1)
    (tmp_path / "zero.tar").touch()
    with pytest.raises(DataError, match=r"zero\.tar is empty"):
        preflight(data_recipe(tmp_path / "zero.tar"), 1)
    with pytest.raises(DataError, match="1 data ranks x 3 workers"):
        preflight(data_recipe(f"{tmp_path}/00*.tar", num_workers=3), 1)
    with pytest.raises(DataError, match="list of shards is empty"):
        preflight(data_recipe(), 1)
