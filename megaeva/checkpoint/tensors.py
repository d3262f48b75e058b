"""Named tensors in files: what there is before anything is read, one whole tensor at a time in and out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class TensorSource(Protocol):
    """A file or folder of tensors, open for reading.

    Attributes:
        path: as the user named it, for messages.
        infos: every tensor, in the file's order.
    """

    path: Path
    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Returns one whole tensor, on the CPU, contiguous, in memory of its own. The source keeps no memory of it.

        Raises:
            CheckpointError: the file is damaged there; names file and tensor.
            KeyError: there is no such tensor.
        """
        ...

    def close(self) -> None:
        """Gives up files and maps."""
        ...


class TensorSink(Protocol):
    """A destination that is written tensor by tensor. What was announced must be written, in the order announced."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor; it must have the shape and dtype announced. OSError: the disk."""
        ...

    def finish(self) -> None:
        """Completes the destination, forces it to the disk and gives it its name. Nothing has it before."""
        ...

    def abort(self) -> None:
        """Removes what was written; whatever stood at the destination before is as it was."""
        ...
