"""Towers: a trainable module, the grid it lives on, and the mcore DistributedDataParallel that reduces its gradients.

Gradient convention: **shares sum**. Every rank's and every microbatch's gradient is its share of the gradient of the
global loss; DDP adds the shares and divides by nothing. mcore has this mode under the name `calculate_per_token_loss`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch import nn

from megaeva.config.schema import ParallelSection
from megaeva.parallel.grid import Grid
from megaeva.parallel.shards import full_shape


@dataclass(frozen=True)
class Tower:
    """One trainable module on one grid.

    Attributes:
        name: "vision", "text", "scale" or "student"; also the key of its learning rate.
        module: the bare module, for checkpoints and evaluation.
        ddp: call this in training; the module itself when nothing in it is trained.
        grid: process groups of this tower.
    """

    name: str
    module: Any
    ddp: Any
    grid: Grid

    @property
    def trained(self) -> bool:
        """Whether any parameter wants a gradient."""
        return self.ddp is not self.module


def wrap(name: str, module: nn.Module, grid: Grid, parallel: ParallelSection) -> Tower:
    """A tower whose gradients are summed over `grid`'s data-parallel ranks. All ranks of the grid call it together.

    Gradients are kept and reduced in fp32; with `parallel.distributed_optimizer` the reduction is a reduce-scatter.
    `parallel.overlap_grad_reduce` needs no `no_sync`: in the first step mcore counts how often each gradient is added,
    over all microbatches, and from the second on reduces a bucket when that count is reached.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return Tower(name, module, module, grid)
    module_config: Any = module.config
    ddp = DistributedDataParallel(
        dataclasses.replace(module_config, calculate_per_token_loss=True),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
        ),
        module,
        pg_collection=grid.groups,
    )
    return Tower(name, module, ddp, grid)


def count_parameters(towers: Sequence[Tower]) -> dict[str, int]:
    """Parameters of each tower over all tensor-parallel ranks, each counted once, and their "total"."""
    counts = {
        tower.name: sum(full_shape(parameter, tower.grid.tp_size).numel() for parameter in tower.module.parameters())
        for tower in towers
    }
    return counts | {"total": sum(counts.values())}


def zero_gradients(towers: Sequence[Tower]) -> None:
    """Clear the gradient buffers of all towers before a step."""
    for tower in towers:
        if tower.trained:
            tower.ddp.zero_grad_buffer()


def reduce_gradients(towers: Sequence[Tower]) -> None:
    """Sum gradient shares over the data-parallel ranks of each tower, in the same order on every rank."""
    for tower in towers:
        if tower.trained:
            finalize_model_grads([tower.ddp], num_tokens=None, pg_collection=tower.grid.groups)
