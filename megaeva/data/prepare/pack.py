"""Shards on disk: tar files whose bytes depend on the samples alone, in a folder that appears whole or not at all."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from megaeva.errors import DataError

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: `key`.jpg, `key`.txt, `key`.json ... .

    Attributes:
        key: without "." and "/", unique in its split.
        parts: extension without its dot, and the bytes.
    """

    key: str
    parts: Mapping[str, bytes]


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        out: the folder.
        samples, shards: how many, for each split (subfolder); "" is the folder itself.
        skipped: how many were left out, by reason.
        first_skipped: the first of them, by reason.
    """

    out: Path
    samples: dict[str, int]
    shards: dict[str, int]
    skipped: dict[str, int]
    first_skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.out / split}: {num:,} samples in {self.shards[split]} shards" for split, num in self.samples.items()
        ]
        for reason, num in sorted(self.skipped.items()):
            first = f" (first: {self.first_skipped[reason]})" if reason in self.first_skipped else ""
            lines.append(f"left out {num:,}: {reason}{first}")
        return "\n".join(lines)


def write_shards(folder: Path, samples: Iterable[Sample], *, samples_per_shard: int) -> tuple[int, int]:
    """The number of samples and of shards written to `folder`/000000.tar, ...; streams, one sample in memory.

    Owner, mode and times in the tar are fixed, so the bytes are a function of the samples alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_samples = num_shards = 0
    iterator = iter(samples)
    while (first := next(iterator, None)) is not None:
        with tarfile.open(folder / f"{num_shards:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in chain([first], islice(iterator, samples_per_shard - 1)):
                for extension, content in sample.parts.items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")  # times, uid, gid are 0, mode is 0644
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                num_samples += 1
        num_shards += 1
    return num_samples, num_shards


def json_bytes(value: object) -> bytes:
    """`value` as JSON, UTF-8, keys in their order."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def write_index(folder: Path, kind: str, content: Mapping[str, object]) -> None:
    """Writes `folder`/index.json; its kind and entries let a later `data_folder` know the folder as ours.

    Call it last: `entries` are the names in `folder` at this moment.
    """
    entries = sorted(entry.name for entry in folder.iterdir())
    text = json.dumps({"kind": kind, **content, "entries": entries}, ensure_ascii=False, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


@contextmanager
def data_folder(out: Path, *, kind: str) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes when it does not.

    `out` may be missing, empty, or a folder that this function made for the same `kind`, which is replaced.

    Raises:
        DataError: `out` is something else, or the disk refuses; `out` is as before then.
    """
    out = Path(os.path.abspath(out))
    _refuse_foreign(out, kind)
    staging, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        staging.mkdir(parents=True)
        yield staging
        assert (staging / INDEX_FILE).is_file(), "write_index marks the folder as ours"
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except BaseException as error:
        if old.exists() and not out.exists():
            old.rename(out)
        if isinstance(error, OSError):
            raise DataError(
                f"{out} cannot be written ({error}); it must be a path on a disk with space left, in a folder you can "
                f"write to, and no mount point; nothing was changed, choose another path"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(out: Path, kind: str) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink():
        entries = {entry.name for entry in out.iterdir()}
        if not entries or entries <= _entries_of_index(out / INDEX_FILE, kind):
            return
    raise DataError(
        f"{out} exists and holds what `megaeva data {kind}` did not write; the output folder must be new, empty or an "
        f"earlier output of the same command; choose another path or move it away"
    )


def _entries_of_index(path: Path, kind: str) -> set[str]:
    """The top-level names that an earlier run wrote; empty if there was none."""
    try:
        index = json.loads(path.read_bytes())
        return {INDEX_FILE, *index["entries"]} if index["kind"] == kind else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
