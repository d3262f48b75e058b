"""Which samples come in which order, and where a stream stands: shards, the plan over ranks and workers, the cursor.

The order is a pure function of (seed, epoch, worker). In each epoch all shards are permuted and dealt out to the
workers of all data ranks, so every sample is seen once in an epoch over all of them. A worker reads its shards in that
order, cuts the stream into chunks of `shuffle_buffer` samples and permutes each chunk. Nothing is dropped at the end:
the last chunk of an epoch is shorter, and a worker goes on with its own next epoch (a worker with fewer shards gets
there earlier). Because a chunk depends on nothing before it, a position is a handful of integers, and resuming re-reads
one shard and one chunk at most, without decoding.

webdataset's naming rules decide what a sample is (`base_plus_ext`); its tar reader is not used because it passes over
links in silence and keeps no place in the shard.
"""

import glob
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from megaeva.errors import DataError

IMAGE_EXTENSIONS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS: tuple[str, ...] = ("mp4", "webm", "mkv", "mov", "avi")
_READ_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, "txt", "json"))
_MAX_MEMBER_BYTES = 256 * 2**20  # a sparse member of a few bytes can claim terabytes
_EMPTY_CHECKED_SHARDS = 10_000  # beyond this a stat of each file takes too long on a network file system


# ------------------------------------------------------------------------------------------------------ shard paths


def expand_shards(patterns: Sequence[str | Path]) -> list[Path]:
    """Paths of the shards that `patterns` name, in the order given, glob results sorted.

    A pattern is a path, a glob (`*`, `?`, `[]`) or a `{000..999}` / `{a,b}` range; `~` is expanded.

    Raises:
        DataError: a shard is missing, empty or named twice, or a glob matches nothing. The path is named.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    paths: list[Path] = []
    for pattern in patterns:
        paths += _expand_pattern(os.path.expanduser(str(pattern)))
    if not paths:
        raise DataError(
            "the list of shards is empty; it must name at least one .tar file; "
            "set it to paths, globs or {000..999} ranges"
        )
    _check_shards(paths)
    return paths


def _expand_pattern(pattern: str) -> list[Path]:
    try:
        expanded = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"shard pattern {pattern!r} cannot be read ({error}); braces must be balanced; "
            "write e.g. data/{000..127}.tar"
        ) from None
    found: list[Path] = []
    for name in expanded:
        # A file whose own name holds a glob character wins over the glob.
        if glob.has_magic(name) and not os.path.exists(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise DataError(
                    f"shard pattern {name!r} (in {os.getcwd()}) matches no file; it must match at least one shard; "
                    "mend the path, run from the folder it starts in, or make the data first (`megaeva data`)"
                )
            found += map(Path, matches)
        else:
            found.append(Path(name))
    return found


def _check_shards(paths: Sequence[Path]) -> None:
    # One directory listing answers for all its shards; a stat of each would take minutes for 100,000.
    listings: dict[Path, frozenset[str]] = {}
    seen: set[Path] = set()
    for number, path in enumerate(paths):
        folder = path.parent
        if folder not in listings:
            listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        if path.name not in listings[folder]:
            raise DataError(
                f"shard {path} does not exist (in {os.getcwd()}); every shard named must be there; "
                "mend the path, run from the folder it starts in, or make the data first (`megaeva data`)"
            )
        if path in seen:
            raise DataError(f"shard {path} is named twice; each must be named once; remove one of the patterns")
        seen.add(path)
        if number < _EMPTY_CHECKED_SHARDS and not path.is_file():
            raise DataError(
                f"shard {path} is not a file; it must be a .tar file; name the files in it, e.g. {path}/*.tar"
            )
        if number < _EMPTY_CHECKED_SHARDS and path.stat().st_size == 0:
            raise _empty_shard(path)


def _empty_shard(path: Path) -> DataError:
    return DataError(
        f"shard {path} is empty; a shard must hold at least one sample (image + txt with the same key); "
        "write it again or take it off the list"
    )


# ---------------------------------------------------------------------------------------------------- inside a shard


@dataclass(frozen=True)
class RawSample:
    """One sample of a shard, undecoded.

    Attributes:
        shard: file name of the shard.
        key: path of the members without their extension.
        index: place in the shard, counted from 0 over everything that `read_shard` gives.
        files: content by lower-case extension; only images, videos, txt and json.
        problem: why it cannot be used, or None.
    """

    shard: str
    key: str
    index: int
    files: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    @property
    def name(self) -> str:
        """The key that messages and batches carry: "shard-name/sample-key"."""
        return f"{self.shard.removesuffix('.tar')}/{self.key}"

    @property
    def image(self) -> bytes | None:
        """The encoded image, or None."""
        return next((self.files[e] for e in IMAGE_EXTENSIONS if e in self.files), None)

    @property
    def video(self) -> bytes | None:
        """The encoded video, or None."""
        return next((self.files[e] for e in VIDEO_EXTENSIONS if e in self.files), None)


def read_shard(path: Path) -> Iterator[RawSample]:
    """The samples of a tar shard in file order: consecutive members with the same key are one sample.

    What cannot be used comes with a `problem`: "unsafe_name" (absolute, `..` or a link; nothing is ever written to disk
    under a member's name), "duplicate_member", "too_large" (a member above 256 MiB, not read), "damaged_shard" (the tar
    ends early; what follows is lost).

    Raises:
        DataError: the shard cannot be opened, is no tar, or holds no sample.
    """
    group: RawSample | None = None
    index = 0
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # a stream keeps every header otherwise
                problem = None
                if not member.isreg():
                    if member.isdir():
                        continue
                    problem = "unsafe_name"  # links and devices
                elif member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    problem = "unsafe_name"
                if problem is not None:
                    if group is not None:
                        yield group
                        index, group = index + 1, None
                    yield RawSample(path.name, member.name, index, problem=problem)
                    index += 1
                    continue
                key, extension = base_plus_ext(member.name)
                if key is None or (key.startswith("__") and key.endswith("__")):
                    continue
                extension = extension.lower()
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                        index += 1
                    group = RawSample(path.name, key, index)
                if extension in _READ_EXTENSIONS:
                    if extension in group.files:
                        group = RawSample(path.name, key, index, group.files, "duplicate_member")
                        continue
                    if member.size > _MAX_MEMBER_BYTES:
                        group = RawSample(path.name, key, index, group.files, "too_large")
                        continue
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file
                    group.files[extension] = content.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if index == 0 and group is None:
            raise DataError(
                f"shard {path} cannot be read ({error}); it must be a tar file; write it again or take it off the list"
            ) from None
        # The sample being read is not whole, so it goes with the rest of the shard.
        yield RawSample(path.name, group.key if group else "?", index, problem="damaged_shard")
        return
    if group is not None:
        yield group
    elif index == 0:
        raise _empty_shard(path)


class ShardReader:
    """Reads shards, and keeps the samples of a set that fits into `max_cached_bytes`: a small set is parsed once."""

    def __init__(self, paths: Sequence[Path], max_cached_bytes: int) -> None:
        total = 0
        for path in paths:
            total += path.stat().st_size
            if total > max_cached_bytes:
                break
        self._kept: dict[Path, tuple[RawSample, ...]] | None = {} if total <= max_cached_bytes else None

    def read(self, path: Path, start: int = 0) -> Iterator[RawSample]:
        """Samples of `path` from index `start` on; see `read_shard`."""
        if self._kept is None:
            return (sample for sample in read_shard(path) if sample.index >= start)
        if path not in self._kept:
            self._kept[path] = tuple(read_shard(path))
        return iter(self._kept[path][start:])


# ------------------------------------------------------------------------------------------------- plan and position


@dataclass(frozen=True)
class Cursor:
    """A position in one stream, JSON-able through `as_dict`.

    Attributes:
        epoch: passes over all its shards that this stream has finished.
        shard: place in this epoch's plan where the current chunk starts.
        sample: place in that shard where the current chunk starts.
        chunk: number of the current chunk in this epoch.
        given: samples of the current chunk that were given out.
    """

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    chunk: int = 0
    given: int = 0

    def as_dict(self) -> dict[str, int]:
        """The fields, for JSON."""
        return asdict(self)


def plan_epoch(num_shards: int, *, seed: int, epoch: int, worker: int, num_workers: int) -> NDArray[np.int64]:
    """Indices of the shards that stream `worker` of all `num_workers` reads in `epoch`, in order."""
    return np.random.default_rng((seed, epoch, 1)).permutation(num_shards)[worker::num_workers]


def sample_rng(seed: int, epoch: int, shard: str, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: crop, flip, mask, kept patches.

    A function of its arguments alone: the same for any number of ranks and workers, on any machine.
    """
    place = np.array([_stream_key(seed, epoch), (zlib.crc32(shard.encode()) << 32) | index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=place))


@lru_cache(maxsize=64)
def _stream_key(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, 2)).generate_state(1, np.uint64)[0])


class Placed(NamedTuple):
    """A sample and the epoch it is given out in."""

    epoch: int
    sample: RawSample


class _Chunk(NamedTuple):
    start: Cursor
    samples: list[RawSample]


class SampleStream:
    """One endless shuffled stream of a run; `cursor` is the position after the last sample given out.

    Memory: `shuffle_buffer` undecoded samples. While one chunk is given out the next is read, one sample for each
    one given, so that reading does not come in bursts.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        seed: int,
        worker: int,
        num_workers: int,
        shuffle_buffer: int,
        cursor: Cursor = Cursor(),
        reader: ShardReader,
    ) -> None:
        """`worker` counts over all streams: 0..num_workers-1; `cursor`: from a stream with the same arguments."""
        self._shards = shards
        self._seed, self._worker, self._num_workers = seed, worker, num_workers
        self._shuffle_buffer = shuffle_buffer
        self._reader = reader
        self._arriving = self._read_from(cursor)
        self._held: tuple[Cursor, RawSample] | None = None  # first sample of the chunk after the one being read
        self._next = _Chunk(replace(cursor, given=0), [])
        self._current = self._next
        self._order = np.empty(0, dtype=np.int64)
        self._start_chunk()
        if cursor.given:
            if cursor.given > len(self._order):
                raise DataError(
                    f"the saved position is sample {cursor.given} of a chunk of {len(self._order)}; shards must be "
                    "the ones of the run that saved it; put them back or start afresh"
                )
            for place in self._order[: cursor.given]:
                self._current.samples[place] = _GONE
        self._given = cursor.given

    @property
    def cursor(self) -> Cursor:
        """The position after the last sample given out."""
        return replace(self._current.start, given=self._given)

    def __iter__(self) -> "SampleStream":
        return self

    def __next__(self) -> Placed:
        if self._given == len(self._order):
            self._start_chunk()
        place = self._order[self._given]
        sample = self._current.samples[place]
        self._current.samples[place] = _GONE  # frees its bytes
        self._given += 1
        self._take_one()
        return Placed(self._current.start.epoch, sample)

    def _start_chunk(self) -> None:
        while self._take_one():
            pass
        self._current = self._next
        start = self._current.start
        rng = np.random.default_rng((self._seed, start.epoch, 3, self._worker, start.chunk))
        self._order = rng.permutation(len(self._current.samples))
        self._given = 0
        if self._held is not None:
            self._next = _Chunk(self._held[0], [self._held[1]])
            self._held = None

    def _take_one(self) -> bool:
        """Reads one sample into the next chunk; False: that chunk is whole."""
        if self._held is not None:
            return False
        start, sample = next(self._arriving)
        if start == self._next.start:
            self._next.samples.append(sample)
            return True
        self._held = (start, sample)
        return False

    def _read_from(self, cursor: Cursor) -> Iterator[tuple[Cursor, RawSample]]:
        """Endless samples in reading order, each with the start of its chunk."""
        epoch, shard, sample, chunk = cursor.epoch, cursor.shard, cursor.sample, cursor.chunk
        while True:
            plan = plan_epoch(
                len(self._shards), seed=self._seed, epoch=epoch, worker=self._worker, num_workers=self._num_workers
            )
            left, start = 0, cursor
            for place in range(shard, len(plan)):
                for raw in self._reader.read(self._shards[plan[place]], sample):
                    if left == 0:
                        left, start = self._shuffle_buffer, Cursor(epoch, place, raw.index, chunk)
                        chunk += 1
                    left -= 1
                    yield start, raw
                sample = 0
            epoch, shard, chunk = epoch + 1, 0, 0


_GONE = RawSample("", "", -1)
