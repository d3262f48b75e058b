"""The optimizers of all towers as one: global gradient norm, step, and what each rank holds of the state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter, fp32 and of its shape: the main copy and two moments."""


class HeldState(NamedTuple):
    """What this rank holds of one parameter's state.

    Attributes:
        parameter: this rank's piece of the model's parameter.
        start: the first element held, in the flattened piece.
        state: {param, exp_avg, exp_avg_sq}: the live fp32 tensors, of the piece's shape or, of a shard, flat.
        is_shard: each data-parallel rank holds its own elements (ZeRO-1), not all of them.
    """

    parameter: Tensor
    start: int
    state: dict[str, Tensor]
    is_shard: bool


def main_state(optimizer: MegatronOptimizer, parameter: Any) -> dict[str, Tensor]:
    """{param, exp_avg, exp_avg_sq} of a model parameter as the optimizer holds them: fp32, whole or this rank's shard.

    Raises:
        KeyError: under the distributed optimizer, when this rank owns no part of the parameter.
    """
    if isinstance(optimizer, DistributedOptimizer):
        group, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][order]
    else:
        # Float16OptimizerWithFloat16Params leaves its fp32 copy on the parameter; an fp32 parameter is its own.
        main = getattr(parameter, "main_param", parameter)
    state = optimizer.optimizer.state[main]
    return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


class TowerOptimizers(ChainedOptimizer):
    """One mcore optimizer for each trained tower, stepped together.

    Attributes:
        num_steps: updates made so far; Adam's t.
    """

    def __init__(self, optimizers: Mapping[str, MegatronOptimizer], parameters: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__(list(optimizers.values()))
        self.optimizers = dict(optimizers)
        self.parameters = {tower: list(values) for tower, values in parameters.items()}
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """Update all towers from their reduced gradients; returns (updated, gradient norm). All ranks call it.

        The norm is over both towers and every rank, before clipping, each parameter counted once. Gradients are scaled
        by clip_grad_norm / (norm + 1e-6) when that is below 1. A norm that is not finite leaves everything untouched.
        """
        self.prepare_grads()
        norm = float(self.get_grad_norm())
        if not math.isfinite(norm):
            self.zero_grad()
            return False, norm
        if self.config.clip_grad > 0.0:
            for optimizer in self.chained_optimizers:
                if parameters := optimizer.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
        self.step_with_ready_grads()
        self.num_steps += 1
        # mcore's plain optimizers left .grad pointing into DDP's buffer; the next backward pass would add it twice.
        self.zero_grad()
        return True, norm

    def held_state(self, tower: str) -> list[HeldState]:
        """This rank's state of a tower's parameters, by reference: checkpoints are written from it and read into it.

        No collective. Rates, decay and betas are not part of it: they come from the recipe. A tower that is not trained
        has none. Under the distributed optimizer a 16-bit parameter is not rewritten from its main copy: it must be
        read as well.
        """
        optimizer = self.optimizers.get(tower)
        if optimizer is None:
            return []
        if not isinstance(optimizer, DistributedOptimizer):
            return [HeldState(p, 0, main_state(optimizer, p), False) for p in self.parameters[tower]]
        held = [p for p in self.parameters[tower] if p in optimizer.model_param_group_index_map]
        starts = [optimizer._get_model_param_range_map(p)["param"].start for p in held]
        return [HeldState(p, start, main_state(optimizer, p), True) for p, start in zip(held, starts, strict=True)]

    def set_num_steps(self, num_steps: int) -> None:
        """Set the number of updates made, Adam's t."""
        for optimizer in self.optimizers.values():
            set_num_steps(optimizer.optimizer, num_steps)
        self.num_steps = num_steps


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments and step 0 now rather than at the first step, so that a checkpoint can be written or read before."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def set_num_steps(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Set Adam's t: torch keeps it beside each parameter, `Lamb` in the group."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = num_steps
        for p in group["params"]:
            optimizer.state[p]["step"].fill_(float(num_steps))
