"""One tensor as a torch.save archive all of whose bytes but the tensor's own are known from dtype, shape and CRC-32.

torch.distributed.checkpoint keeps every box of a tensor as such an archive. Made by hand, the memory of the tensor goes
to the file as it is, and a reader needs no unpickling: it compares what surrounds the tensor byte for byte.
"""

import io
import pickle
import struct
from collections import OrderedDict
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

HEAD_BYTES = 64
"""Where the tensor begins: the length of the local header of `archive/data/0` with its 64-bit sizes."""

_STORAGES: dict[torch.dtype, type] = {
    torch.float32: torch.FloatStorage, torch.float64: torch.DoubleStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage, torch.bool: torch.BoolStorage,
}  # fmt: skip
DTYPES = frozenset(_STORAGES)
"""What can be written."""

_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
_ZIP_VERSION = 45  # the first with 64-bit sizes
_DATE = 0x21  # 1 January 1980
_IN_EXTRA = 0xFFFFFFFF


def surroundings(dtype: torch.dtype, shape: tuple[int, ...], checksum: int) -> tuple[bytes, bytes]:
    """What stands before and after a contiguous tensor's bytes.

    Args:
        checksum: CRC-32 of the tensor's bytes.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    head = _local_header(b"archive/data/0", num_bytes, checksum)
    assert len(head) == HEAD_BYTES
    tail = b""
    members = [(b"archive/data/0", num_bytes, checksum, 0)]
    for name, content in (
        (b"archive/data.pkl", _pickled(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        members.append((name, len(content), crc32(content), HEAD_BYTES + num_bytes + len(tail)))
        tail += _local_header(name, len(content), crc32(content)) + content
    directory = b"".join(_central_header(*member) for member in members)
    start, count = HEAD_BYTES + num_bytes + len(tail), len(members)
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, _ZIP_VERSION, _ZIP_VERSION, 0, 0, count, count, len(directory), start
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), _IN_EXTRA, 0)
    return head, tail + directory + end64 + locator + end


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _local_header(name: bytes, size: int, checksum: int) -> bytes:
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    fixed = (_ZIP_VERSION, 0, 0, 0, _DATE, checksum, _IN_EXTRA, _IN_EXTRA, len(name), len(extra))
    return struct.pack("<4sHHHHHIIIHH", _LOCAL, *fixed) + name + extra


def _central_header(name: bytes, size: int, checksum: int, position: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, size, size, position)
    fixed = (_ZIP_VERSION, _ZIP_VERSION, 0, 0, 0, _DATE, checksum, _IN_EXTRA, _IN_EXTRA, len(name), len(extra))
    return struct.pack("<4sHHHHHHIIIHHHHHII", _CENTRAL, *fixed, 0, 0, 0, 0, _IN_EXTRA) + name + extra


class _StorageMark:
    """Stands for the archive's one storage in the pickle."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.persistent_id = ("storage", _STORAGES[dtype], "0", "cpu", numel)


class _TensorMark:
    """Is pickled as the call that makes the tensor."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        size = torch.Size(shape)
        strides = torch.empty(size, device="meta").stride()
        self.arguments: tuple[Any, ...] = (_StorageMark(dtype, size.numel()), 0, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.persistent_id if isinstance(value, _StorageMark) else None


def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_TensorMark(dtype, shape))
    return stream.getvalue()
