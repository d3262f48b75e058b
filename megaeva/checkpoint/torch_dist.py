"""Checkpoint folders as torch.distributed.checkpoint and mcore's `torch_dist` have them, written and read by hand.

    __0_0.distcp ...  boxes of tensors one after the other, a file for each rank that wrote
    .metadata         torch's index: every tensor's shape, dtype and boxes, and where they are
    checksums.json    a CRC-32 for every box and for `.metadata`
    metadata.json, common.pt    with which `megatron.core.dist_checkpointing.load` recognises the folder

Neither torch's nor mcore's `save` and `load` are called: they plan in collectives, start processes, copy the tensors
two or three times, know no checksums, and unpickle. Here a rank writes its file alone, and an index of a few hundred
bytes a box is all that ranks exchange.

What is trusted: nothing of a tensor's record is unpickled; `.metadata` is a pickle by format and is read by an
unpickler that knows the dozen classes of torch.distributed.checkpoint and nothing else, so a crafted file ends in an
error and runs nothing; records without checksums (of other programs) go through torch.load(weights_only=True).
`common.pt` is an empty dictionary and never read.
"""

# Before anything here imports megatron.core: it guards that import against a broken Transformer Engine.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip

import io
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megaeva.checkpoint import layout
from megaeva.checkpoint.disk_file import DiskFile, read_bytes
from megaeva.checkpoint.pieces import OPTIMIZER, Piece, overlap
from megaeva.checkpoint.record import DTYPES, memory, surroundings
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.errors import CheckpointError

T = TypeVar("T")

CHECKSUMS_NAME = "checksums.json"
_METADATA = ".metadata"
_WITH_CHECKSUMS = "megaeva, with checksums.json"  # in `.metadata`: its records are ours, and each has a CRC-32
_USE_ANOTHER = "the checkpoint is damaged or not ours, use another one"

ALLOWED_GLOBALS: frozenset[tuple[str, str]] = frozenset(
    {("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )}
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
    | {("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")}
)  # fmt: skip
"""What `.metadata` may name. Constructors of plain records and torch constants: none of them acts."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def first_line(error: BaseException) -> str:
    """OSError: [Errno 27] File too large"""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Record:
    """One box of a tensor in a file.

    Attributes:
        key: name of the whole tensor.
        whole: its shape.
        offset, shape: the box.
        file: name in the checkpoint folder.
        position, length: of the archive in the file, bytes.
        checksum: CRC-32 of the box's bytes; None where none was written down.
    """

    key: str
    whole: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int
    length: int
    checksum: int | None


FileIndex: TypeAlias = list[Record]
"""What one file holds; small and picklable."""


class FileWriter:
    """One rank's file of boxes. No collective, and no thought for other files: `write_index` checks how they fit."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Creates the file in a folder that exists. OSError: the disk refuses."""
        self._path = folder / f"__{rank}_0.distcp"
        self._file = DiskFile(self._path)
        self._records: FileIndex = []
        self._position = 0

    def write(self, key: str, whole: Sequence[int], offset: Sequence[int], data: Tensor) -> None:
        """Append one box of the tensor `key`; its bytes go to the file as they are.

        Args:
            whole: shape of the whole tensor.
            offset: where in it `data` begins.
            data: any device; copied only if it is not contiguous on the CPU.

        Raises:
            OSError: the disk; the file is closed then and not to be used.
        """
        data = data.detach().cpu().contiguous()
        content = memory(data)
        shape, checksum = tuple(data.shape), crc32(content)
        head, tail = surroundings(data.dtype, shape, checksum)
        try:
            position = self._position
            for part in (head, content, tail):
                self._file.write(memoryview(part), position)
                position += len(part)
        except BaseException:
            self.abort()
            raise
        length = position - self._position
        self._records.append(
            Record(
                key, tuple(whole), data.dtype, tuple(offset), shape, self._path.name, self._position, length, checksum
            )
        )
        self._position = position

    def close(self) -> FileIndex:
        """Force the file to the disk; returns what it holds. OSError: the disk."""
        try:
            self._file.sync()
        finally:
            self.abort()
        return self._records

    def abort(self) -> None:
        """Close a file that is not going to be complete, without an error."""
        with suppress(OSError):
            self._file.close()


def write_index(folder: Path, indexes: Sequence[FileIndex]) -> None:
    """Make a folder of closed files a checkpoint of torch_dist and force that to the disk. One rank calls it.

    Raises:
        CheckpointError: the boxes do not make up every tensor exactly once.
        OSError: the disk.
    """
    records: dict[str, list[Record]] = defaultdict(list)
    for record in chain.from_iterable(indexes):
        records[record.key].append(record)
    for boxes in records.values():
        if fault := _fault_of_boxes(boxes):
            raise CheckpointError(
                f"{folder}: {fault}; together the ranks must write every element once; this is a fault of megaeva, "
                "please report it with the recipe."
            )
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    checksums: dict[str, dict[int, str]] = defaultdict(dict)
    for key, boxes in records.items():
        chunks = [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in boxes]
        properties = TensorProperties(dtype=boxes[0].dtype)
        state[key] = TensorStorageMetadata(properties, torch.Size(boxes[0].whole), chunks)
        for number, box in enumerate(boxes):
            places[MetadataIndex(key, box.offset, number)] = _StorageInfo(box.file, box.position, box.length)
            checksums[box.file][box.position] = f"{box.checksum:08x}"
    metadata = pickle.dumps(
        Metadata(state, storage_data=places, storage_meta=StorageMeta(save_id=_WITH_CHECKSUMS), version="1.0.0")
    )
    empty = io.BytesIO()
    torch.save({}, empty)
    layout.write_durably(folder / _METADATA, metadata)
    layout.write_durably(
        folder / CHECKSUMS_NAME,
        json.dumps({"algorithm": "crc32", _METADATA: f"{crc32(metadata):08x}", "files": checksums}),
    )
    layout.write_durably(folder / "metadata.json", json.dumps(asdict(CheckpointingConfig("torch_dist", 1))))
    layout.write_durably(folder / "common.pt", empty.getvalue())
    layout.sync_folder(folder)


def _fault_of_boxes(boxes: Sequence[Record]) -> str | None:
    """What is wrong with the boxes of one tensor, in words; None if they are its elements, each once."""
    first = boxes[0]
    if any((b.whole, b.dtype) != (first.whole, first.dtype) for b in boxes):
        return f"tensor {first.key} has two shapes or dtypes"
    for box in boxes:
        ends = (o + n for o, n in zip(box.offset, box.shape, strict=True))
        if any(o < 0 for o in box.offset) or any(e > n for e, n in zip(ends, box.whole, strict=True)):
            return f"tensor {box.key} of shape {list(box.whole)} has a box {list(box.shape)} at {list(box.offset)}"
    # Each box against those that begin before it ends, along the first dimension.
    open_boxes: list[Record] = []
    for box in sorted(boxes, key=lambda b: b.offset):
        open_boxes = [b for b in open_boxes if not b.offset or b.offset[0] + b.shape[0] > box.offset[0]]
        for other in open_boxes:
            if other.offset == box.offset or overlap(other.offset, other.shape, box.offset, box.shape):
                return f"tensor {box.key} holds the box {list(box.shape)} at {list(box.offset)} twice"
        open_boxes.append(box)
    held, wanted = sum(prod(b.shape) for b in boxes), prod(first.whole)
    return None if held == wanted else f"tensor {first.key} has {held} of its {wanted} elements"


# ------------------------------------------------------------------------------------------------------------- reading


class Reader:
    """The tensors of a checkpoint folder, whole or box by box, each rank for itself. A `TensorSource`.

    Every record read is held against its CRC-32 and against the bytes that must surround it.

    Attributes:
        path: the checkpoint folder.
        infos: every tensor, optimizer state included, in the order of the files' index.
        weights: those that are no optimizer state.
        has_checksums: False for a folder that another program wrote, or a megaeva before checksums.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        CheckpointError: the index is missing, damaged, no checkpoint's, or does not make up whole tensors.
        """
        self.path = folder
        self._files: dict[str, int] = {}
        self._records, self.has_checksums = _read_index(folder)
        self.infos: Mapping[str, TensorInfo] = {
            key: TensorInfo(boxes[0].whole, boxes[0].dtype) for key, boxes in self._records.items()
        }
        self.weights = {key: info for key, info in self.infos.items() if not key.startswith(OPTIMIZER)}

    def read(self, name: str) -> Tensor:
        """One whole tensor. CheckpointError: damaged; KeyError: not there."""
        boxes, info = self._records[name], self.infos[name]
        if len(boxes) == 1:
            return self._load(boxes[0])
        whole = torch.empty(info.shape, dtype=info.dtype)
        self.read_into(name, (0,) * len(info.shape), whole)
        return whole

    def read_into(self, key: str, offset: Sequence[int], target: Tensor) -> None:
        """Fill `target`, of any dtype, device and strides, with the box of its shape at `offset`.

        Raises:
            CheckpointError: the file is damaged there; names file and tensor.
            KeyError: there is no such tensor.
        """
        self._fill(key, [(tuple(offset), target)])

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fill many boxes; a record from which several are cut is read once. Errors as in `read_into`."""
        targets: dict[str, list[tuple[tuple[int, ...], Tensor]]] = defaultdict(list)
        for piece in pieces:
            targets[piece.key].append((piece.offset, piece.data))
        for key, boxes in targets.items():
            self._fill(key, boxes)

    def verify(self) -> None:
        """Read everything once. CheckpointError: the first damage."""
        for record in chain.from_iterable(self._records.values()):
            self._load(record)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    @torch.no_grad()
    def _fill(self, key: str, targets: Sequence[tuple[tuple[int, ...], Tensor]]) -> None:
        whole = self.infos[key].shape
        for offset, target in targets:
            ends = [o + n for o, n in zip(offset, target.shape, strict=True)]
            assert min(offset, default=0) >= 0 and all(e <= n for e, n in zip(ends, whole, strict=True)), key
        for record in self._records[key]:
            shared = [(o, t, overlap(o, t.shape, record.offset, record.shape)) for o, t in targets]
            if all(box is None for _, _, box in shared):
                continue
            offset, target, _ = next(entry for entry in shared if entry[2] is not None)
            if target.is_cpu and target.is_contiguous() and _is_whole(record, offset, target):
                self._load(record, target)  # without a copy on the way
                continue
            source = self._load(record)
            for offset, target, box in shared:
                if box is not None:
                    _cut(target, offset, box).copy_(_cut(source, record.offset, box))

    def _load(self, record: Record, target: Tensor | None = None) -> Tensor:
        """A record's tensor, read into a contiguous `target` of its shape and dtype if there is one."""
        try:
            if target is None:
                target = torch.empty(record.shape, dtype=record.dtype)
            if self.has_checksums:
                self._load_own(record, target)
            else:
                target.copy_(self._load_foreign(record))
            return target
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive raises nearly anything
            raise self._damage(record, first_line(error)) from error

    def _load_own(self, record: Record, target: Tensor) -> None:
        assert record.checksum is not None
        expected = surroundings(record.dtype, record.shape, record.checksum)
        head, tail = (bytearray(len(part)) for part in expected)
        content = memory(target)
        position = record.position
        for part in (memoryview(head), content, memoryview(tail)):
            self._read_exactly(record, part, position)
            position += len(part)
        found = crc32(content)
        if found != record.checksum:
            raise self._damage(record, f"its CRC-32 is {found:08x}, expected {record.checksum:08x}")
        if (bytes(head), bytes(tail)) != expected:
            raise self._damage(record, "the bytes around it are not those that were written")

    def _load_foreign(self, record: Record) -> Tensor:
        archive = bytearray(record.length)
        self._read_exactly(record, memoryview(archive), record.position)
        tensor = torch.load(io.BytesIO(archive), weights_only=True, map_location="cpu")
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (record.shape, record.dtype):
            raise self._damage(record, f"the archive holds another thing than {list(record.shape)} {record.dtype}")
        return tensor

    def _read_exactly(self, record: Record, target: memoryview, position: int) -> None:
        if record.file not in self._files:
            try:
                with layout.still_there(self.path):
                    self._files[record.file] = os.open(self.path / record.file, os.O_RDONLY)
            except OSError as error:
                raise self._damage(record, f"the file cannot be opened: {error.strerror}") from error
        got = read_bytes(self._files[record.file], target, position)
        if got < len(target):
            raise self._damage(record, f"the file ends at byte {position + got}")

    def _damage(self, record: Record, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / record.file}, tensor {record.key}, bytes {record.position} to "
            f"{record.position + record.length}: {what}; it must be as it was written; {_USE_ANOTHER}"
        )


def _is_whole(record: Record, offset: tuple[int, ...], target: Tensor) -> bool:
    return (offset, tuple(target.shape), target.dtype) == (record.offset, record.shape, record.dtype)


def _cut(tensor: Tensor, offset: Sequence[int], box: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """The part of a box's data at `offset` that another box (offset, shape) in it is."""
    return tensor[tuple(slice(b - o, b - o + n) for o, b, n in zip(offset, *box, strict=True))]


def _read_index(folder: Path) -> tuple[dict[str, list[Record]], bool]:
    """The records by tensor, and whether they have checksums."""
    path = folder / _METADATA
    try:
        with layout.still_there(folder):
            raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be used: {error.strerror}; it must be what megaeva wrote; {_USE_ANOTHER}"
        ) from error
    checksums = _read_checksums(folder / CHECKSUMS_NAME)
    if checksums is not None and crc32(raw) != checksums.metadata:
        raise CheckpointError(
            f"{path}: its CRC-32 is {crc32(raw):08x}, expected {checksums.metadata:08x}; it must be as it was written; "
            f"{_USE_ANOTHER}"
        )
    try:
        metadata = _unpickle(raw)
        if checksums is None and getattr(metadata.storage_meta, "save_id", None) == _WITH_CHECKSUMS:
            raise ValueError(f"{CHECKSUMS_NAME} is missing beside it")
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        records = {
            _typed(key, str): [_record(key, entry, chunk, places, checksums) for chunk in entry.chunks]
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        for key, boxes in records.items():
            if fault := _fault_of_boxes(boxes) if boxes else f"tensor {key} has no part":
                raise ValueError(fault)
    except Exception as error:  # a crafted index raises nearly anything
        what = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be used: {what}; it must be what megaeva wrote; {_USE_ANOTHER}"
        ) from error
    _check_files(folder, records)
    return records, checksums is not None


class _Checksums(NamedTuple):
    metadata: int
    files: dict[str, dict[int, int]]  # file: {position: CRC-32}


def _read_checksums(path: Path) -> _Checksums | None:
    """None where there are none: a folder of another program, or of a megaeva before them."""
    try:
        with layout.still_there(path.parent):
            written = json.loads(path.read_bytes())
        files = {
            name: {int(position): int(checksum, 16) for position, checksum in places.items()}
            for name, places in written["files"].items()
        }
        return _Checksums(int(written[_METADATA], 16), files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be used ({first_line(error)}); it must hold a CRC-32 for every record; {_USE_ANOTHER}"
        ) from error


def _unpickle(raw: bytes) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    return _typed(metadata, Metadata)


def _record(
    key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata, places: Any, checksums: _Checksums | None
) -> Record:
    """One box as the index has it; ValueError, or nearly anything, if it is not one."""
    offset = tuple(chunk.offsets)
    place = _typed(places[MetadataIndex(key, offset)], _StorageInfo)
    file, dtype = _typed(place.relative_path, str), entry.properties.dtype
    if Path(file).name != file:
        raise ValueError(f"tensor {key} is said to be in {file!r}, which is no name of a file in the folder")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {key} is said to be of {dtype}")
    numbers = [_typed(n, int) for n in (place.offset, place.length, *offset, *chunk.sizes, *entry.size)]
    if min(numbers) < 0:
        raise ValueError(f"tensor {key} has a negative size or place")
    checksum = None
    if checksums is not None:
        checksum = checksums.files.get(file, {}).get(place.offset)
        if checksum is None:
            raise ValueError(f"{CHECKSUMS_NAME} has none for {file} at byte {place.offset}, tensor {key}")
    size, sizes = tuple(entry.size), tuple(chunk.sizes)
    return Record(key, size, dtype, offset, sizes, file, place.offset, place.length, checksum)


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"it holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _check_files(folder: Path, records: dict[str, list[Record]]) -> None:
    """That every file is there and as long as its records say, before anything is read or allocated for them."""
    sizes: dict[str, int] = {}
    for record in chain.from_iterable(records.values()):
        path = folder / record.file
        if record.file not in sizes:
            try:
                with layout.still_there(folder):
                    sizes[record.file] = path.stat().st_size
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be opened: {error.strerror}; it must hold tensor {record.key}; {_USE_ANOTHER}"
                ) from error
        end, needed = record.position + record.length, prod(record.shape) * record.dtype.itemsize
        if end > sizes[record.file] or needed > record.length:
            raise CheckpointError(
                f"{path} has {sizes[record.file]} bytes, and tensor {record.key} of {needed} bytes is said to be in "
                f"bytes {record.position} to {end}; the file must be whole; {_USE_ANOTHER}"
            )
