"""The contract between the loader and the tasks."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Batch:
    """The samples of a data block for one optimizer step, or a slice of them.

    Attributes:
        image_BCHW: fp32, normalised with the CLIP mean and deviation. Of videos, the T frames of a sample are T rows in
            the order of time, and likewise those of keep_BK.
        keys: sample keys, "shard-name/sample-key", for error messages and resume tests.
        token_BL: int64 token ids padded with 0; None in MIM.
        mask_BN: bool, True where the student sees the mask token; None outside MIM. Rows may differ in count.
        keep_BK: int64 patch indices in 0..N-1 that survive patch dropout, cls not counted; None when all are kept.
    """

    image_BCHW: Tensor
    keys: tuple[str, ...]
    token_BL: Tensor | None = None
    mask_BN: Tensor | None = None
    keep_BK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def frames(self) -> int:
        """Images of a sample: 1, or above it for videos."""
        return len(self.image_BCHW) // len(self)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @classmethod
    def of_images(cls, image_BCHW: Tensor) -> "Batch":
        """Images alone, without keys."""
        return cls(image_BCHW, ("",) * len(image_BCHW))

    def padded(self, multiple: int) -> "Batch":
        """A batch of images whose size is a multiple, filled up with its last image; what fills up has no mask."""
        missing = -len(self) % multiple
        if missing == 0:
            return self
        filled = Batch.of_images(torch.cat([self.image_BCHW, self.image_BCHW[-1:].expand(missing, -1, -1, -1)]))
        if self.mask_BN is None:
            return filled
        return replace(filled, mask_BN=functional.pad(self.mask_BN, (0, 0, 0, missing)))

    def split(self, size: int) -> "list[Batch]":
        """Consecutive parts of `size` samples; `size` must divide the batch."""
        if len(self) % size:
            raise ValueError(f"parts of {size} do not divide a batch of {len(self)} samples")
        return self.in_parts(len(self) // size)

    def in_parts(self, number: int) -> "list[Batch]":
        """Consecutive parts, alike to one sample, the larger ones first."""
        base, larger = divmod(len(self), number)
        cuts = [part * base + min(part, larger) for part in range(number + 1)]
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        rows = {name: len(value) // len(self) for name, value in values.items()}  # of a sample
        return [
            replace(self, **{name: value[i * rows[name] : j * rows[name]] for name, value in values.items()})
            for i, j in itertools.pairwise(cuts)
        ]
