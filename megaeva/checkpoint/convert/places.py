"""Tensors that lie in files as plain bytes: where each one is, and reading it into memory of its own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaeva.checkpoint.disk_file import read_bytes
from megaeva.checkpoint.record import memory
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements are.

    Attributes:
        offset: of the first element's byte in `file`.
        stride: in elements.
    """

    file: Path
    offset: int
    info: TensorInfo
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, those between that are not its own included."""
        sizes = self.info.shape
        return 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, self.stride, strict=True))


def dense_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return torch.empty(tuple(shape), device="meta").stride()


class PlacedTensors:
    """Files of tensors as a `TensorSource`. Files are read, not mapped: mapped pages count as resident memory."""

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        """Args:
        path: as the user named it.
        """
        self.path = path
        self.infos: Mapping[str, TensorInfo] = {name: place.info for name, place in places.items()}
        self._places = places
        self._descriptors: dict[Path, int] = {}

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        place = self._places[name]
        shape, dtype = place.info.shape, place.info.dtype
        flat = torch.empty(place.span, dtype=dtype)
        try:
            got = read_bytes(self._descriptor(place.file), memory(flat), place.offset)
        except OSError as error:
            raise CheckpointError(
                f"{place.file}: {name} cannot be read ({error.strerror}); the file must be readable throughout; "
                "check the disk or copy the file again."
            ) from error
        if got != flat.nbytes:
            raise CheckpointError(
                f"{place.file}: {name} has {got} of its {flat.nbytes} bytes; the file was cut short after it was "
                "opened; copy it again."
            )
        return flat.as_strided(shape, place.stride).contiguous()

    def close(self) -> None:
        """See `TensorSource.close`."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]
