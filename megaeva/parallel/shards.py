"""Tensor-parallel pieces of a parameter and the full tensor they make.

A parameter carries Megatron-core's attributes: `tensor_model_parallel` (False or absent: replicated), `partition_dim`,
and `partition_stride`, which is 2 for a gated weight: every rank holds [piece of w1; piece of w2] of the full [w1; w2].
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaeva.parallel.grid import Grid


def is_sharded(param: Any) -> bool:
    """True when each tensor-parallel rank holds only a piece of `param`."""
    return bool(getattr(param, "tensor_model_parallel", False))


def full_shape(param: Any, tp_size: int) -> torch.Size:
    """Returns the shape of the tp=1 tensor of which `param` is one of `tp_size` pieces."""
    shape = list(param.shape)
    if is_sharded(param):
        shape[param.partition_dim] *= tp_size
    return torch.Size(shape)


def slice_full(full: Tensor, param: Any, tp_rank: int, tp_size: int) -> Tensor:
    """Returns rank `tp_rank`'s piece of `full` (tp=1 layout), cut as `param` is.

    Raises:
        ValueError: the tensor cannot be cut into `tp_size` equal pieces.
    """
    if tp_size == 1 or not is_sharded(param):
        return full
    pieces = tp_size * param.partition_stride
    if full.shape[param.partition_dim] % pieces:
        raise ValueError(f"dim {param.partition_dim} of {tuple(full.shape)} cannot be cut into {pieces} equal pieces")
    chunks = full.chunk(pieces, param.partition_dim)
    return torch.cat(chunks[tp_rank::tp_size], param.partition_dim)


def join(pieces: list[Tensor], param: Any) -> Tensor:
    """Returns the tp=1 tensor of the pieces of ranks 0, 1, ..., cut as `param` is: the inverse of `slice_full`."""
    if len(pieces) == 1 or not is_sharded(param):
        return pieces[0]
    parts = [piece.chunk(param.partition_stride, param.partition_dim) for piece in pieces]
    ordered = [part[stride] for stride in range(param.partition_stride) for part in parts]
    return torch.cat(ordered, param.partition_dim)


def gather_full(local: Tensor, param: Any, grid: Grid) -> Tensor:
    """Returns the full (tp=1 layout) tensor; all tensor-parallel ranks must call it and all get it.

    Args:
        local: this rank's piece: the parameter itself, its gradient, or anything else of its shape.
        param: the parameter whose attributes say how it was cut.
    """
    if grid.tp_size == 1 or not is_sharded(param):
        return local.detach()
    local = local.detach().contiguous()
    pieces = [torch.empty_like(local) for _ in range(grid.tp_size)]
    dist.all_gather(pieces, local, group=grid.groups.tp)
    return join(pieces, param)
