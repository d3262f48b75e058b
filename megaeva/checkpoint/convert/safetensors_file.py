"""Safetensors files, single and sharded: read by their headers, written tensor by tensor."""

import json
import struct
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaeva.checkpoint.convert.destination import Beside, Destination
from megaeva.checkpoint.convert.format import MAX_SHARD_BYTES
from megaeva.checkpoint.convert.places import Place, dense_stride
from megaeva.checkpoint.disk_file import DiskFile
from megaeva.checkpoint.layout import write_durably
from megaeva.checkpoint.record import memory
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the library's own bound
SUFFIX = ".safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as a safetensors file does: the length of a JSON header, and its brace."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES


def safetensors_places(file: Path) -> dict[str, Place]:
    """Where the tensors of one file are, in its order.

    Raises:
        CheckpointError: it is cut short or damaged, or of a dtype that no weights here have.
    """
    try:
        with safe_open(file, "pt"):  # the library's checks of the header against the file's size; reads no tensor
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({error}); it must be complete; "
            "it was cut short or damaged, copy it again."
        ) from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: {name} is {entry['dtype']}; weights here must be one of {', '.join(DTYPES)}; cast it first."
            )
        info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        places[name] = Place(file, 8 + length + entry["data_offsets"][0], info, dense_stride(info.shape))
    return places


class SafetensorsSink:
    """A folder of `{stem}.safetensors`, or of shards and `{stem}.safetensors.index.json`."""

    def __init__(
        self,
        folder: Path,
        infos: Mapping[str, TensorInfo],
        shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        beside: Beside | None = None,
    ) -> None:
        """Lays out all files before a tensor is written.

        Args:
            folder: must not exist.
            shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.
            beside: see `Beside`; called at once.

        Raises:
            CheckpointError: the destination exists.
            OSError: the disk.
        """
        self._destination = Destination(folder)
        self._files: list[DiskFile] = []
        self._places: dict[str, tuple[DiskFile, int, TensorInfo]] = {}  # file, offset, what belongs there
        try:
            if beside is not None:
                beside(self._destination.folder)
            self._lay_out(_shards(infos, shard_bytes), stem)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """See `TensorSink.write`."""
        file, offset, info = self._places.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{name} is not as announced"
        file.write(memory(tensor.contiguous()), offset)

    def finish(self) -> None:
        """See `TensorSink.finish`."""
        assert not self._places, f"not written: {list(self._places)}"
        self._close()
        self._destination.publish_folder()

    def abort(self) -> None:
        """See `TensorSink.abort`."""
        self._close()
        self._destination.remove()

    def _lay_out(self, shards: list[dict[str, TensorInfo]], stem: str) -> None:
        folder = self._destination.folder
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"{stem}{SUFFIX}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{SUFFIX}"
            self._files.append(DiskFile(folder / file))
            self._start_file(self._files[-1], shard)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(info.num_bytes for shard in shards for info in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_durably(folder / f"{stem}{SUFFIX}.index.json", json.dumps(index, indent=2))

    def _start_file(self, file: DiskFile, shard: Mapping[str, TensorInfo]) -> None:
        # Wide elements first, as the library does: every tensor is then aligned to its element.
        order = sorted(shard, key=lambda name: -shard[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = list(accumulate(shard[name].num_bytes for name in order))
        for name, end in zip(order, ends, strict=True):
            info = shard[name]
            offsets = [end - info.num_bytes, end]
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        file.write(memoryview(struct.pack("<Q", len(raw)) + raw), 0)
        for name, end in zip(order, ends, strict=True):
            self._places[name] = (file, 8 + len(raw) + end - shard[name].num_bytes, shard[name])

    def _close(self) -> None:
        for file in self._files:
            file.close()


def _shards(infos: Mapping[str, TensorInfo], most_bytes: int) -> list[dict[str, TensorInfo]]:
    """The tensors in order, as many to a shard as fit."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > most_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards
