"""A module's tensors as mcore sharded tensors: whole-tensor names and shapes, whatever the topology."""

# Before anything here imports megatron.core: it guards that import against a broken Transformer Engine.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip

from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megaeva.parallel.grid import Grid
from megaeva.parallel.shards import is_sharded

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def sharded_tensors(module: nn.Module, prefix: str, grid: Grid) -> dict[str, Sharded]:
    """{prefix + name: sharded tensor} of a module's parameters and persistent buffers; `data` are the module's own.

    How a tensor is cut is read from mcore's attributes on it (see megaeva/parallel/shards.py); without them it is a
    replica. Of all copies, the one at rank 0 of every other axis is written.
    """
    tensors: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    # Transformer Engine's fp8 bookkeeping, a pickle and no weight.
    return {
        prefix + name: shard_tensor(prefix + name, tensor, grid)
        for name, tensor in tensors.items()
        if not name.endswith("_extra_state")
    }


def shard_tensor(key: str, tensor: Any, grid: Grid) -> Sharded:
    """This rank's piece of one tensor."""
    if not is_sharded(tensor):
        return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, grid.tp_rank, grid.dp_rank))
    replica_id = (0, 0, grid.dp_rank)
    dim, stride = tensor.partition_dim, tensor.partition_stride
    if stride == 1 or grid.tp_size == 1:
        offsets = (dim, grid.tp_rank, grid.tp_size)
        return ShardedTensor.from_rank_offsets(key, tensor, offsets, replica_id=replica_id)

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        # Piece i of this rank is piece i * tp_size + tp_rank of the whole [w1; w2].
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(
                key, piece, (dim, i * grid.tp_size + grid.tp_rank, stride * grid.tp_size), replica_id=replica_id
            )
            for i, piece in enumerate(data.chunk(stride, dim))
        ]

    return ShardedTensorFactory(key, tensor, build, lambda pieces: torch.cat(pieces, dim), replica_id)


def full_shape(sharded: Sharded) -> tuple[int, ...]:
    """The whole tensor's shape."""
    return tuple((sharded.build()[0] if isinstance(sharded, ShardedTensorFactory) else sharded).global_shape)
