"""The optimizers of all towers as one: global gradient norm, step, and what each rank holds of the state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megaeva.optim.loss_scale import LossScale

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter, fp32 and of its shape: the main copy and two moments."""
AVERAGE = "ema"
"""Beside them in a run with optim.ema_decay; see ema.py."""


class HeldState(NamedTuple):
    """What this rank holds of one parameter's state.

    Attributes:
        parameter: this rank's piece of the model's parameter.
        start: the first element held, in the flattened piece.
        state: {param, exp_avg, exp_avg_sq} and perhaps ema: the live fp32 tensors, of the piece's shape or, of a shard,
            flat.
        is_shard: each data-parallel rank holds its own elements (ZeRO-1), not all of them.
    """

    parameter: Tensor
    start: int
    state: dict[str, Tensor]
    is_shard: bool


def main_state(optimizer: MegatronOptimizer, parameter: Any) -> dict[str, Tensor]:
    """{param, exp_avg, exp_avg_sq} of a model parameter as the optimizer holds them: fp32, whole or this rank's shard.

    And ema, the parameter's average over the run, where one is kept.

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
    return {"param": main} | {key: state[key] for key in ("exp_avg", "exp_avg_sq", AVERAGE) if key in state}


class TowerOptimizers(ChainedOptimizer):
    """One mcore optimizer for each trained tower, stepped together: `prepare`, then `update` or `drop`.

    Attributes:
        num_steps: updates made so far; Adam's t.
        scale: what the loss must be multiplied by before backward, of fp16; else None.
    """

    def __init__(
        self,
        optimizers: Mapping[str, MegatronOptimizer],
        parameters: Mapping[str, Sequence[Tensor]],
        scale: LossScale | None = None,
    ) -> None:
        super().__init__(list(optimizers.values()))
        self.optimizers = dict(optimizers)
        self.parameters = {tower: list(values) for tower, values in parameters.items()}
        self.num_steps = 0
        self.scale = scale

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is to be multiplied by before backward; 1 but for fp16."""
        return 1.0 if self.scale is None else self.scale.value

    @torch.no_grad()
    def prepare(self) -> float:
        """Make the reduced gradients ready, divided by the loss scale; returns their norm. All ranks call it.

        The norm is over both towers and every rank, before clipping, each parameter counted once. In fp16 it also sets
        the loss scale of the next step.
        """
        overflowed = self.prepare_grads()
        norm = math.inf if overflowed else float(self.get_grad_norm())
        if self.scale is not None:
            self.scale.settle(not math.isfinite(norm))
        return norm

    @torch.no_grad()
    def update(self, norm: float, *, measure: bool = False) -> dict[str, float]:
        """Step all towers with the prepared gradients, of that norm, which must be finite. All ranks call it.

        Gradients are scaled by clip_grad_norm / (norm + 1e-6) when that is below 1.

        Args:
            measure: return {"grad_norm/<tower>": before clipping, "update_rms/<tower>": the root of the mean square of
                what all its parameters changed by, in the fp32 main copies}. Cost: a copy of one tower's main
                parameters at a time, and one all-reduce of three numbers a tower. False: returns nothing.
        """
        sums = []
        for optimizer in self.chained_optimizers:
            counted = _counted_once(optimizer) if measure else []
            square = _square_sum([p.grad for p in counted if p.grad is not None]) if measure else 0.0
            if self.config.clip_grad > 0.0 and (parameters := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
            changes = [p.detach().clone() for p in counted]
            optimizer.step_with_ready_grads()
            if measure:
                for change, parameter in zip(changes, counted, strict=True):
                    change -= parameter
                group = optimizer.get_grad_stats_parallel_group()
                # Ranks outside of the group that the norm is summed over hold the same.
                share = 1.0 if group is None else group.size() / dist.get_world_size()
                numel = sum(change.numel() for change in changes)
                sums.append([share * x for x in (square, _square_sum(changes), numel)])
        self.num_steps += 1
        self.drop()
        return self._figures(sums) if measure else {}

    def drop(self) -> None:
        """Forget the gradients of a step. mcore's plain optimizers leave .grad pointing into DDP's buffer; the next
        backward pass would add it twice."""
        self.zero_grad()

    def step(self) -> tuple[bool, float]:
        """`prepare` and, if the norm is finite, `update`; returns (updated, norm). A norm that is not finite leaves
        everything untouched but fp16's loss scale. All ranks call it."""
        norm = self.prepare()
        if not math.isfinite(norm):
            self.drop()
            return False, norm
        self.update(norm)
        return True, norm

    def _figures(self, sums: list[list[float]]) -> dict[str, float]:
        device = self.get_loss_scale().device
        total = torch.tensor(sums, dtype=torch.float64, device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        figures = {}
        for tower, (square, change, numel) in zip(self.optimizers, total.tolist(), strict=True):
            figures[f"grad_norm/{tower}"] = math.sqrt(square)
            figures[f"update_rms/{tower}"] = math.sqrt(change / numel)
        return figures

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


def _counted_once(optimizer: MegatronOptimizer) -> list[Tensor]:
    """The main parameters of this rank without those that another tensor-parallel rank holds as well and counts."""
    group = optimizer.tp_group
    return [p for p in optimizer.get_parameters() if param_is_not_tensor_parallel_duplicate(p, group)]


def _square_sum(tensors: Sequence[Tensor]) -> float:
    return math.fsum(torch.stack([t.square().sum() for t in tensors]).tolist()) if tensors else 0.0


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
