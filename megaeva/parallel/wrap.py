"""Towers: a trainable module, the grid it lives on, and the mcore DistributedDataParallel that reduces its gradients.

Gradient convention: **shares sum**. Every rank's and every microbatch's gradient is its share of the gradient of the
global loss; DDP adds the shares and divides by nothing. mcore has this mode under the name `calculate_per_token_loss`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megaeva.config.schema import ParallelSection
from megaeva.parallel.collectives import gather_objects
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

    @property
    def sharded_optimizer(self) -> bool:
        """Whether each data-parallel rank updates its share of the parameters (ZeRO-1)."""
        return self.trained and bool(self.ddp.ddp_config.use_distributed_optimizer)


class _Reducer(DistributedDataParallel):
    """mcore's, but the first gradient of a step replaces the last step's instead of being added to zeros.

    A third of the memory traffic, and of a gradient in bf16 no fp32 copy is made.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unwritten: set[Any] = set()  # before mcore makes the hooks; the buffers start as zeros
        super().__init__(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Forget the last step's gradients; the buffers keep them until the first of this step."""
        self._unwritten = set(self.params_with_grad)
        for bucket_group in self.bucket_groups:
            bucket_group.reset()

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """As mcore's; a parameter that no backward pass reached has a gradient of zero."""
        for parameter in self._unwritten:
            parameter.main_grad.zero_()
        self._unwritten.clear()
        super().finish_grad_sync(*args, **kwargs)

    def _make_backward_post_hook(self, param: Any) -> Any:
        add = super()._make_backward_post_hook(param)

        def write_or_add(*unused: Any) -> None:
            if param in self._unwritten and param.grad is not None:
                self._unwritten.remove(param)
                param.main_grad.copy_(param.grad)
                # What is left for mcore's hook is to drop .grad and to count it for the overlapped reduction.
                param.grad_added_to_main_grad = True
                add()
                param.grad_added_to_main_grad = False
            else:
                add()

        return write_or_add


def wrap(name: str, module: nn.Module, grid: Grid, parallel: ParallelSection) -> Tower:
    """A tower whose gradients are summed over `grid`'s data-parallel ranks. All ranks of the grid call it together.

    Gradients are kept and reduced in fp32; with `parallel.distributed_optimizer` the reduction is a reduce-scatter, and
    so `Tower.sharded_optimizer`. Not on a single data-parallel rank: there is nothing to share out, and gloo copies the
    whole gradient and parameter buffers to itself.
    `parallel.overlap_grad_reduce` needs no `no_sync`: in the first step mcore counts how often each gradient is added,
    over all microbatches, and from the second on reduces a bucket when that count is reached.

    With `parallel.overlap_param_gather` an optimizer step leaves each rank with its own share of the new parameters;
    the others arrive during the next forward pass, of the DDP or of the bare module: a module's parameters are there
    when its `forward` is called, those above the blocks when the tower's is. Whoever reads them otherwise, to save or
    to evaluate, calls `finish_parameter_gather` first.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return Tower(name, module, module, grid)
    module_config: Any = module.config
    names = [name for name, _ in module.named_parameters()]
    sharded = parallel.distributed_optimizer and grid.dp_size > 1
    ddp = _Reducer(
        dataclasses.replace(module_config, calculate_per_token_loss=True),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            # Without blocks (the scale) there is no forward worth overlapping with; its value is read after the step.
            overlap_param_gather=sharded and parallel.overlap_param_gather and any(map(_in_blocks, names)),
        ),
        module,
        pg_collection=grid.groups,
    )
    if ddp.use_forward_hook:
        _gather_what_precedes_the_blocks(module, ddp)
    return Tower(name, module, ddp, grid)


def _gather_what_precedes_the_blocks(module: nn.Module, ddp: Any) -> None:
    """Let the module's forward wait for the parameters before its blocks, whichever method of which module reads them.

    mcore waits for a parameter when the module that owns it is called; a student reads `vision.pos_embed` without
    calling `vision`. They are gathered first in any case, so nothing is lost.
    """
    first = [p for _, p in takewhile(lambda named: not _in_blocks(named[0]), module.named_parameters())]

    def wait(*_: Any) -> None:
        for parameter in first:
            if parameter in ddp.param_to_bucket_group:
                ddp.param_to_bucket_group[parameter].finish_param_sync()

    module.register_forward_pre_hook(wait)


def _in_blocks(parameter_name: str) -> bool:
    return "blocks." in parameter_name


def finish_parameter_gather(towers: Sequence[Tower]) -> None:
    """Bring every rank's parameters up to date after an optimizer step. All ranks call it.

    Does nothing unless the towers were wrapped with `overlap_param_gather`; see `wrap`.
    """
    for tower in towers:
        if tower.trained and tower.ddp.use_forward_hook:
            # Each dispatches the one before it, as in a forward pass; those that have arrived cost nothing.
            for bucket_group in reversed(tower.ddp.bucket_groups):
                bucket_group.finish_param_sync()


def count_parameters(towers: Sequence[Tower]) -> dict[str, int]:
    """Parameters of each whole tower, each counted once, and their "total". All ranks call it, all get the same."""
    counts = {}
    for tower in towers:
        grid = tower.grid
        here = sum(full_shape(parameter, grid.tp_size).numel() for parameter in tower.module.parameters())
        counts[tower.name] = here if grid.pp_size == 1 else sum(gather_objects(here, grid.groups.pp))
    return counts | {"total": sum(counts.values())}


def zero_gradients(towers: Sequence[Tower]) -> None:
    """Clear the gradient buffers of all towers before a step."""
    for tower in towers:
        if tower.trained:
            tower.ddp.zero_grad_buffer()


def reduce_gradients(towers: Sequence[Tower]) -> None:
    """Sum gradient shares over the data-parallel ranks of each tower, in the same order on every rank.

    Under sequence parallelism a parameter marked `sequence_parallel` has a share on each tensor-parallel rank; those
    are summed after, which is right with the distributed optimizer too: its shards lie alike on all of them.
    """
    for tower in towers:
        if tower.trained:
            groups: Any = tower.grid.groups
            # The towers tie no weights between stages, so nothing goes over the groups of embeddings.
            reduced_over = ProcessGroupCollection(
                tp=groups.tp, pp=groups.pp, dp_cp=groups.dp_cp, embd=None, pos_embd=None
            )
            finalize_model_grads([tower.ddp], num_tokens=None, pg_collection=reduced_over)
