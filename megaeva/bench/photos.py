"""Shards like LAION's for `megaeva bench data`: photographs of 512 pixels on the longest side, with captions."""

import importlib.util
import io
import os
import shutil
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from megaeva.data.shards import expand_shards
from megaeva.errors import UserError

FOLDER = Path("data/bench/photos_512")
NUM_COPIES = 6  # of each shard, as links: more bytes than the loader keeps in memory, as in a set of real size
_NUM_SHARDS = 4
_SAMPLES_PER_SHARD = 256
# Photographs that packages of megaeva[demo,eval] bring along: package, file.
_SOURCES = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
_SIZES = ((512, 384), (512, 342), (512, 288), (512, 512), (384, 512), (342, 512))  # width, height
_QUALITIES = (85, 95)
_SHARE_SHOWN = (0.7, 1.0)  # of the largest window of a source, in width and height


def photo_shards(
    folder: Path = FOLDER, num_shards: int = _NUM_SHARDS, samples_per_shard: int = _SAMPLES_PER_SHARD
) -> list[Path]:
    """Paths of the shards in `folder`, written on the first call: random windows of three photographs as JPEGs.

    Each shard is there under `NUM_COPIES` names. Captions are three class names of ImageNet; hardly one comes twice.

    Raises:
        UserError: a package that brings a photograph is not installed.
    """
    if not folder.is_dir():
        sources = [Image.open(_file_of(package, name)).convert("RGB") for package, name in _SOURCES]
        class_names = _class_names()
        rng = np.random.default_rng(0)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            for shard in range(num_shards):
                name = f"{shard:04d}.tar"
                with webdataset.TarWriter(str(unfinished / name), mtime=0.0) as writer:
                    for sample in range(samples_per_shard):
                        words = rng.choice(class_names, 3)
                        writer.write(
                            {
                                "__key__": f"{shard:04d}{sample:04d}",
                                "jpg": _draw_photo(rng, sources[rng.integers(len(sources))]),
                                "txt": f"a photo of a {words[0]} and a {words[1]} beside a {words[2]}".encode(),
                            }
                        )
                for copy in range(1, NUM_COPIES):
                    (unfinished / f"{shard:04d}_{copy}.tar").symlink_to(name)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return expand_shards([folder / "*.tar"])


def _draw_photo(rng: np.random.Generator, source: Image.Image) -> bytes:
    width, height = _SIZES[rng.integers(len(_SIZES))]
    zoom = min(source.width / width, source.height / height) * rng.uniform(*_SHARE_SHOWN)
    shown_width, shown_height = zoom * width, zoom * height
    left, top = rng.uniform(0, source.width - shown_width), rng.uniform(0, source.height - shown_height)
    box = (left, top, left + shown_width, top + shown_height)
    encoded = io.BytesIO()
    photo = source.resize((width, height), Image.Resampling.BICUBIC, box)
    photo.save(encoded, "JPEG", quality=int(rng.integers(*_QUALITIES, endpoint=True)))
    return encoded.getvalue()


def _file_of(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the photograph {name} of the package {package} is not there; the benchmark's images are cut from it; "
            "run: pip install scikit-learn matplotlib"
        )
    return path


def _class_names() -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)
