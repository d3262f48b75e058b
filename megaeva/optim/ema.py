"""An exponential moving average of the weights (EMA), kept beside the optimizer's moments: fp32, in the same shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor

from megaeva.optim.tower_optimizer import AVERAGE, TowerOptimizers


def start_average(optimizer: TowerOptimizers) -> None:
    """Let the average of every trained parameter be a copy of its fp32 main parameter as it is now. No collective."""
    for main, state in _held(optimizer):
        state[AVERAGE] = main.detach().clone()


@torch.no_grad()
def update_average(optimizer: TowerOptimizers, decay: float) -> None:
    """average = decay * average + (1 - decay) * parameter, after a step. No collective, no memory.

    A logit scale is to be clamped before, so that its average stays within the bounds too. Source of the form:
    torch.optim.swa_utils.get_ema_multi_avg_fn, and timm's ModelEmaV3 without warm-up.
    """
    held = list(_held(optimizer))
    if held:
        torch._foreach_lerp_([state[AVERAGE] for _, state in held], [main for main, _ in held], 1.0 - decay)


@contextmanager
def averaged_weights(optimizer: TowerOptimizers) -> Iterator[None]:
    """Within it the towers compute with the averages; afterwards with their weights again, bit for bit.

    Averages and main parameters change places, and back; the model's own copies are written from the main parameters
    and gathered over data ranks, as after a step. So it takes no memory, and no checkpoint may be read or written
    within. All ranks call it; `finish_parameter_gather` must have been called since the last step.
    """
    _change_places(optimizer)
    try:
        yield
    finally:
        _change_places(optimizer)


@torch.no_grad()
def _change_places(optimizer: TowerOptimizers) -> None:
    for main, state in _held(optimizer):
        weight = main.clone()
        main.copy_(state[AVERAGE])
        state[AVERAGE].copy_(weight)
    for one in optimizer.optimizers.values():
        if isinstance(one, MixedPrecisionOptimizer):
            one._copy_main_params_to_model_params()
        if isinstance(one, DistributedOptimizer):
            for ddp in one.model_chunks:
                ddp.start_param_sync(force_sync=True)


def _held(optimizer: TowerOptimizers) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The fp32 main parameters that this rank updates, each with its state."""
    for one in optimizer.optimizers.values():
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                yield main, one.optimizer.state[main]
