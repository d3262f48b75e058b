"""The look at the first shard."""

import io
import tarfile
from pathlib import Path

import pytest

from megaeva.config.schema import (
    Config,
    DataSection,
    MaskSection,
    MIMSection,
    ModelSection,
    OptimSection,
    TextSection,
    TowerOptimSection,
    TrainSection,
    VisionSection,
)
from megaeva.data.preflight import preflight
from megaeva.data.synthetic import make_shards
from megaeva.errors import DataError


def recipe(*train: object, task: str = "contrastive", num_workers: int = 0) -> Config:
    vision = VisionSection(
        image_size=24, patch_size=6, hidden_size=16, num_layers=1, num_heads=1, ffn_hidden_size=16,
        activation="gelu", qkv_bias="qkv",
    )  # fmt: skip
    text = TextSection(context_length=12, hidden_size=16, num_layers=1, num_heads=1, ffn_hidden_size=16)
    return Config(
        task=task,  # type: ignore[arg-type]
        run_dir="unused",
        model=ModelSection(embed_dim=16, vision=vision, text=text),
        mim=MIMSection(mask=MaskSection(num_masked=6, min_block=2)) if task == "mim" else None,
        data=DataSection(train=tuple(map(str, train)), num_workers=num_workers),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-3)),
        train=TrainSection(total_samples=100, global_batch_size=8),
    )


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
    report = preflight(recipe(f"{tmp_path}/*.tar"), data_size=2)
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
        preflight(recipe(path), 1)
    assert "captions are not used" in preflight(recipe(path, task="mim"), 1)


def test_shards_without_images(tmp_path: Path) -> None:
    (source,) = make_shards(tmp_path, num_shards=1, samples_per_shard=5)
    path = rewrite(source, tmp_path / "blind.tar", ".txt")
    with pytest.raises(DataError, match=r"5 missing_image.*members: txt x 5"):
        preflight(recipe(path, task="mim"), 1)


def test_missing_empty_and_too_few(tmp_path: Path) -> None:
    make_shards(tmp_path, num_shards=2, samples_per_shard=2)
    with pytest.raises(DataError, match=r"absent\.tar does not exist"):
        preflight(recipe(tmp_path / "absent.tar"), 1)
    (tmp_path / "zero.tar").touch()
    with pytest.raises(DataError, match=r"zero\.tar is empty"):
        preflight(recipe(tmp_path / "zero.tar"), 1)
    with pytest.raises(DataError, match="1 data ranks x 3 workers"):
        preflight(recipe(f"{tmp_path}/00*.tar", num_workers=3), 1)
    with pytest.raises(DataError, match="list of shards is empty"):
        preflight(recipe(), 1)
