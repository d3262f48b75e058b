"""Zip files of torch.save and of TorchScript: read without torch's unpickler and without code, written in place.

What a pickle may name is listed here: records and constants. Everything else ends in an error, and nothing is called.
"""

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaeva.checkpoint.convert.destination import Beside, Destination
from megaeva.checkpoint.convert.places import Place
from megaeva.checkpoint.disk_file import DiskFile
from megaeva.checkpoint.record import memory
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.errors import CheckpointError

STATE_KEYS = ("model", "module", "state_dict")
"""Under which training scripts keep the state dict, beside optimizer and epoch."""

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_IGNORED = frozenset(
    {("argparse", "Namespace"), ("torch", "device"), ("torch", "Size"), ("_codecs", "encode"), ("numpy", "dtype"),
     ("numpy", "ndarray"), ("pathlib", "PosixPath"), ("pathlib", "Path"), ("builtins", "set"), ("builtins", "slice")}
    | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {("torch", str(dtype).removeprefix("torch.")) for dtype in _STORAGES.values()}
)  # fmt: skip
"""Found beside weights (arguments, epochs, measured values): kept as a record of nothing, never called."""


_STORAGE = re.compile(r"torch\.\w+Storage")


class _Record:
    """An object of a class that is not built: its attributes if it is a TorchScript module, else nothing."""

    __slots__ = ("attributes",)

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class _Storage:
    record: str  # name in the zip
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Strided:
    """What a pickle says of a tensor."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _NotAllowed(pickle.UnpicklingError):
    pass


def _tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _Strided:
    return _Strided(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) in (("torch._utils", "_rebuild_parameter"), ("torch.jit._pickle", "restore_type_tag")):
            return _first
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module.startswith("torch.jit._pickle") and name.startswith("build_"):  # typed lists
            return _first
        if module == "__torch__" or module.startswith("__torch__.") or (module, name) in _IGNORED:
            return _Record
        raise _NotAllowed(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, numel = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, not to a storage")
        return _Storage(f"data/{key}", dtype, int(numel))


def is_zip(file: Path) -> bool:
    """Whether a file begins as a zip file does."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def torch_places(file: Path) -> dict[str, Place]:
    """Where the tensors of a zip file of torch.save or TorchScript are, under their names in the state dict.

    Raises:
        CheckpointError: it is cut short or damaged, no file of torch, names anything but tensors and plain records, or
            its state dict holds something else than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in records:
                raise CheckpointError(
                    f"{file} is a zip file without data.pkl; it must be one that torch.save or torch.jit.save wrote; "
                    "if weights are packed in it, unpack it and give their file."
                )
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise CheckpointError(
                    f"{file} was written by a big-endian machine; it must be little-endian; save it again on another."
                )
            found = _unpickle(file, archive.read(records["data.pkl"]))
            tensors = dict(_module_tensors(found)) if isinstance(found, _Record) else _state_dict(file, found)
            if not tensors:
                raise CheckpointError(f"{file} holds no tensor; it must hold a state dict; give the file of weights.")
            return {name: _place(file, stream, records, name, tensor) for name, tensor in tensors.items()}
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) begins as a file of torch.save and is not whole ({error}); its zip "
            "directory must be at the end; it was cut short or damaged, copy it again."
        ) from error


def refuse_old_pickle(file: Path) -> None:
    """Raises the CheckpointError of files of torch.save before 1.6 and of plain pickles."""
    raise CheckpointError(
        f"{file} is a pickle, not a zip file: torch.save wrote it before torch 1.6, or something else did; weights are "
        "read from zip files and safetensors, without running a pickle; write it anew:\n"
        f"{_rewriting(file, 'True', 's')}\n"
        "(weights_only=True refuses files that would run code)."
    )


def _rewriting(file: Path, weights_only: str, what: str) -> str:
    return (
        f"  python -c \"import torch; s = torch.load('{file}', map_location='cpu', weights_only={weights_only}); "
        f"torch.save({what}, '{file.with_name(file.stem + '_weights.pt')}')\""
    )


def _unpickle(file: Path, data: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _NotAllowed as error:
        if str(error).startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")) or _STORAGE.fullmatch(
            str(error)
        ):
            raise CheckpointError(
                f"{file} holds a tensor that is sparse, quantized, or of an unusual dtype ({error}); weights must be "
                f"dense and one of {', '.join(sorted(map(str, _STORAGES.values())))}; cast it before converting."
            ) from error
        raise CheckpointError(
            f"{file}: its pickle names {error}, which weights do not need; it must hold tensors by name and plain "
            "values; nothing of it was run. If you trust the file, write its state dict alone (this runs its code):\n"
            + _rewriting(file, "False", "s['state_dict']")
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(
            f"{file}: its pickle cannot be read ({type(error).__name__}: {error}); it must be what torch.save wrote; "
            "it is damaged, copy it again."
        ) from error


def _state_dict(file: Path, found: Any) -> dict[str, _Strided]:
    place = "its top"
    for _ in range(2):
        key = next((k for k in STATE_KEYS if isinstance(found, dict) and isinstance(found.get(k), dict)), None)
        if key is not None:
            found, place = found[key], f"`{key}`"
    entries = found.items() if isinstance(found, dict) else ()
    others = {str(name): type(value) for name, value in entries if not isinstance(value, _Strided)}
    if not isinstance(found, dict) or others:
        listed = ", ".join(f"{name} ({kind.__name__.strip('_')})" for name, kind in list(others.items())[:8])
        if isinstance(found, _Strided):
            raise CheckpointError(
                f"{file} holds one tensor without a name; it must hold a state dict, tensors by name; "
                "give the file of weights."
            )
        raise CheckpointError(
            f"{file}: {place} holds {listed or f'a {type(found).__name__}'} that is no tensor"
            + (f", and {len(others) - 8} more" if len(others) > 8 else "")
            + f"; a state dict must hold only tensors, at the top or under {', '.join(STATE_KEYS)}; "
            "save the state dict alone."
        )
    if all(str(name).startswith("module.") for name in found):  # of DistributedDataParallel
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def _module_tensors(module: _Record, prefix: str = "") -> Iterator[tuple[str, _Strided]]:
    for name, value in module.attributes.items():
        if isinstance(value, _Strided):
            yield prefix + name, value
        elif isinstance(value, _Record):
            yield from _module_tensors(value, f"{prefix}{name}.")


def _place(file: Path, stream: BinaryIO, records: Mapping[str, zipfile.ZipInfo], name: str, tensor: _Strided) -> Place:
    storage, info = tensor.storage, TensorInfo(tensor.shape, tensor.storage.dtype)
    record = records.get(storage.record)
    place = Place(file, 0, info, tensor.stride)
    if (
        record is None
        or record.compress_type != zipfile.ZIP_STORED
        or len(tensor.shape) != len(tensor.stride)
        or min((*tensor.shape, *tensor.stride, tensor.offset)) < 0
        or tensor.offset + place.span > storage.numel
        or storage.numel * info.dtype.itemsize > record.file_size
    ):
        raise CheckpointError(
            f"{file}: {name} {list(tensor.shape)} is not where the pickle says ({storage.record} of the zip, "
            f"{'missing' if record is None else f'{record.file_size} bytes'}); every tensor must lie whole and "
            "uncompressed in the zip; the file is damaged or was packed again, save it with torch.save."
        )
    start = _data_offset(stream, record) + tensor.offset * info.dtype.itemsize
    return replace(place, offset=start)


def _data_offset(stream: BinaryIO, record: zipfile.ZipInfo) -> int:
    stream.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return record.header_offset + 30 + name_length + extra_length


class TorchSink:
    """A file that `torch.load(weights_only=True, mmap=True)` reads: a plain state dict.

    torch writes the zip with holes for the numbers; they are filled in as they come, with their CRC-32.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], beside: Beside | None = None) -> None:
        """Args:
        path: of the file; must not exist.
        beside: see `Beside`; called at once.

        Raises:
            CheckpointError: the destination exists.
            OSError: the disk.
        """
        self._destination = Destination(path)
        self._file: DiskFile | None = None
        try:
            if beside is not None:
                beside(self._destination.folder)
            file = self._destination.folder / path.name
            _write_skeleton(file, infos)
            self._holes = _holes(file, infos)
            self._file = DiskFile(file)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """See `TensorSink.write`."""
        info, hole = self._holes.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{name} is not as announced"
        assert self._file is not None
        data = memory(tensor.contiguous())
        if data:
            self._file.write(data, hole.offset)
            checksum = memoryview(struct.pack("<I", zlib.crc32(data)))
            for offset in hole.checksums:
                self._file.write(checksum, offset)

    def finish(self) -> None:
        """See `TensorSink.finish`."""
        assert not self._holes, f"not written: {list(self._holes)}"
        self._close()
        self._destination.publish_file()

    def abort(self) -> None:
        """See `TensorSink.abort`."""
        self._close()
        self._destination.remove()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class _Hole:
    """Where a storage's bytes belong in the zip, and where their CRC-32 is repeated."""

    offset: int
    checksums: tuple[int, int]


def _write_skeleton(file: Path, infos: Mapping[str, TensorInfo]) -> None:
    with FakeTensorMode():
        state = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, file)
    except RuntimeError as error:  # torch's zip writer only notices that fewer bytes arrived than it gave
        raise OSError("the file was cut short, as on a full disk") from error


def _holes(file: Path, infos: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, _Hole]]:
    """Storage i of the zip is tensor i."""
    holes: dict[int, _Hole] = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        entry = archive.start_dir
        for record in archive.infolist():  # in the order of the directory
            number = record.filename.partition("/data/")[2]
            if number:
                start = _data_offset(stream, record)
                holes[int(number)] = _Hole(start, (start + record.file_size + 4, entry + 16))
            stream.seek(entry + 28)
            entry += 46 + sum(struct.unpack("<HHH", stream.read(6)))
    return {name: (info, holes[i]) for i, (name, info) in enumerate(infos.items())}
