"""What the ranks of a contrastive loss must agree on before any feature moves: shapes, dtypes, finite rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megaeva.errors import FeatureError
from megaeva.ops.contrastive import accumulate_dtype
from megaeva.parallel.collectives import all_gather_rows

_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A dtype's code is its place here; all ranks run one torch.
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_NAMES = ("image_BE", "text_BE")
_BLOCK = 1024  # rows whose norms are computed at once, so that no wide copy of the features exists


def require_agreement(
    group: ProcessGroup | None, *, image_BE: Tensor | None = None, text_BE: Tensor | None = None
) -> None:
    """Nothing, where every rank of `group` passes finite features [B, E] of one shape and floating dtype.

    All ranks of the group call it; a rank whose features are wrong sends their description as well, so that all ranks
    raise, with one text. Communication: 12 integers. Cost: one read of the features, and the host waits for the device,
    since features of differing shapes must not be sent. Traced by torch.compile it does nothing: a NaN is the loss's.

    Args:
        image_BE: None where this call is about the other modality alone.

    Raises:
        FeatureError: a ValueError that names the fault, the rank, the modality and the first row.
    """
    if torch.compiler.is_compiling():
        return
    features = [x_BE for x_BE in (image_BE, text_BE) if x_BE is not None]
    header = torch.cat([_describe(x_BE, features[0].device) for x_BE in (image_BE, text_BE)])
    ranks = all_gather_rows(header[None], group).tolist()
    fault = next(_faults([[_Seen(*rank[:6]), _Seen(*rank[6:])] for rank in ranks]), None)
    if fault is not None:
        raise FeatureError(fault)


@dataclass(frozen=True)
class _Seen:
    """One modality on one rank: what is sent of it."""

    num_dims: int  # -1: not passed
    num_rows: int
    width: int
    dtype_code: int
    num_bad: int
    first_bad: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype_code]

    def __str__(self) -> str:
        if self.num_dims == 2:
            return f"[{self.num_rows}, {self.width}]"
        return f"a tensor of {self.num_dims} dimensions" if self.num_dims >= 0 else "not passed"


def _describe(x_BE: Tensor | None, device: torch.device) -> Tensor:
    """The six integers of `_Seen`, on the device."""
    if x_BE is None:
        return torch.tensor([-1, 0, 0, 0, 0, 0], device=device)
    is_matrix = x_BE.dim() == 2
    shape = x_BE.shape if is_matrix else (0, 0)
    static = torch.tensor([x_BE.dim(), *shape, _DTYPES.index(x_BE.dtype)], device=device)
    if not is_matrix or shape[0] == 0 or x_BE.dtype not in _FEATURE_DTYPES:
        return torch.cat([static, static.new_zeros(2)])
    bad_B = ~_row_norms(x_BE.detach()).isfinite()
    return torch.cat([static, torch.stack([bad_B.sum(), bad_B.long().argmax()])])


def _row_norms(x_BE: Tensor) -> Tensor:
    """The norm of each row [B], not finite where an element is not, or where it overflows and the row would be lost."""
    wide = accumulate_dtype(x_BE.dtype)
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=wide) for block in x_BE.split(_BLOCK)])


def _faults(ranks: Sequence[Sequence[_Seen]]) -> Iterator[str]:
    """What is wrong, the most basic first. Each rank gives its images and its texts."""
    for rank, modalities in enumerate(ranks):
        for name, seen, first_rank in zip(_NAMES, modalities, ranks[0], strict=True):
            if (seen.num_dims < 0) != (first_rank.num_dims < 0):
                has, lacks = (rank, 0) if seen.num_dims >= 0 else (0, rank)
                yield (
                    f"{name} is passed on rank {has} and not on rank {lacks}; all ranks must make the same calls; call "
                    f"start_gather on every rank or on none"
                )
            if seen.num_dims < 0:
                continue
            if seen.num_dims != 2:
                yield f"{name} on rank {rank} is {seen}; it must be a matrix [rows, embedding]; reshape it"
            if seen.dtype not in _FEATURE_DTYPES:
                known = ", ".join(str(dtype) for dtype in _FEATURE_DTYPES)
                yield f"{name} on rank {rank} is {seen.dtype}; it must be one of {known}; convert it"
            if seen.num_rows == 0 or seen.width == 0:
                yield f"{name} on rank {rank} is {seen}, empty; every rank must pass at least one row; skip this batch"
        image, text = modalities
        if image.num_dims < 0 or text.num_dims < 0:
            continue
        if str(image) != str(text):
            yield (
                f"image_BE is {image} and text_BE {text} on rank {rank}; row i of both is one pair, so the shapes must "
                f"be equal; pass as many texts as images, of one embedding width"
            )
        if image.dtype != text.dtype:
            yield (
                f"image_BE is {image.dtype} and text_BE {text.dtype} on rank {rank}; the dtypes must be equal; "
                f"convert one of them"
            )
    for rank, modalities in enumerate(ranks):
        for name, seen, other in zip(_NAMES, modalities, ranks[0], strict=True):
            if str(seen) != str(other):
                yield (
                    f"{name} is {other} on rank 0 and {seen} on rank {rank}; every rank must pass the same number of "
                    f"rows and the same width; deal equal batches, e.g. drop the last, smaller one"
                )
            if seen.dtype_code != other.dtype_code:
                yield (
                    f"{name} is {other.dtype} on rank 0 and {seen.dtype} on rank {rank}; the dtypes must be equal; "
                    f"convert them"
                )
    bad = [
        f"{name} on rank {rank} in {seen.num_bad} of {seen.num_rows} rows, first in row {seen.first_bad}"
        for rank, modalities in enumerate(ranks)
        for name, seen in zip(_NAMES, modalities, strict=True)
        if seen.num_bad
    ]
    if bad:
        more = f", and {len(bad) - 4} more" if len(bad) > 4 else ""
        yield (
            f"not finite: {', '.join(bad[:4])}{more}; features must be finite, and their norms; lower the learning "
            f"rate, or look at the data of these rows"
        )
