"""Any folder of images with same-named .txt captions, packed into shards."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from megaeva.data.prepare.pack import Sample, Summary, data_folder, json_bytes, write_index, write_shards
from megaeva.errors import DataError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class _SkippedError(Exception):
    """Why one image is left out; its text is the reason that is counted."""


def prepare_folder(src: Path, out: Path, *, samples_per_shard: int = 1000) -> Summary:
    """What was packed from `src` into `out`/000000.tar, ...: each image with its caption and its path in `src`.

    An image is a .jpg, .jpeg, .png or .webp at any depth, its caption the .txt of the same name beside it. Samples are
    in the order of their paths and named by a running number, so no file name reaches the tar. An image is left out,
    and counted by reason, if its caption is missing, empty or not UTF-8, if its header cannot be decoded, or if it is
    a link that leads out of `src`. Linked folders are not entered.

    Raises:
        DataError: `src` is not a folder or holds no usable sample, or `out` holds something else.
    """
    src, out = Path(src), Path(out)
    if not src.is_dir():
        raise DataError(f"{src} is not a folder; it must hold images and same-named .txt captions; check the path")
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard={samples_per_shard} must be at least 1; 1000 is a good size")
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    with data_folder(out, kind="folder") as staging:
        num_samples, num_shards = write_shards(
            staging, _samples(src, skipped, first), samples_per_shard=samples_per_shard
        )
        if not num_samples:
            reasons = ", ".join(f"{num} {reason}" for reason, num in skipped.most_common()) or "it has no image file"
            raise DataError(
                f"{src} holds no usable sample ({reasons}); it must hold .jpg, .png or .webp images, each with a "
                f"UTF-8 caption in a .txt file of the same name beside it; add the captions or choose another folder"
            )
        write_index(staging, "folder", {"samples": num_samples, "shards": num_shards, "skipped": dict(skipped)})
    return Summary(out, {"": num_samples}, {"": num_shards}, dict(skipped), first)


def _samples(src: Path, skipped: Counter[str], first: dict[str, str]) -> Iterator[Sample]:
    root = src.resolve()
    number = 0

    def unreadable(_: OSError) -> None:
        skipped["folder cannot be read"] += 1

    for folder, subfolders, files in os.walk(src, onerror=unreadable):
        subfolders.sort()  # in place: the order of the walk
        skipped.update("linked folder, not entered" for name in subfolders if (Path(folder) / name).is_symlink())
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix.lower() not in _IMAGE_SUFFIXES:
                continue
            try:
                image, extension = _read_image(path, root)
                caption = _read_caption(path.with_suffix(".txt"), root)
            except _SkippedError as reason:
                skipped[str(reason)] += 1
                first.setdefault(str(reason), str(path))
                continue
            source = os.fsencode(path.relative_to(src).as_posix()).decode("utf-8", "replace")
            parts = {extension: image, "txt": caption.encode("utf-8"), "json": json_bytes({"source": source})}
            yield Sample(f"{number:09d}", parts)
            number += 1


def _read(path: Path, root: Path, what: str) -> bytes:
    if not Path(os.path.realpath(path)).is_relative_to(root):  # unlike resolve(), silent about a loop of links
        raise _SkippedError(f"{what} is a link that leads out of the folder")
    try:
        # Not a pipe or a device, which could block for ever.
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        raise _SkippedError(f"{what} cannot be read") from None


def _read_image(path: Path, root: Path) -> tuple[bytes, str]:
    content = _read(path, root, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=list(_EXTENSION_OF_FORMAT)) as image:
                return content, _EXTENSION_OF_FORMAT[str(image.format)]
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _SkippedError("image has too many pixels (decompression bomb)") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise _SkippedError("image header cannot be decoded") from None


def _read_caption(path: Path, root: Path) -> str:
    if not os.path.lexists(path):
        raise _SkippedError("caption file is missing")
    try:
        caption = _read(path, root, "caption").decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _SkippedError("caption is not UTF-8") from None
    if not caption:
        raise _SkippedError("caption is empty")
    return caption
