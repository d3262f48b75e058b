"""The optimizers of all towers as one: global gradient norm, step, and state in a layout no topology shows in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megaeva.parallel.collectives import all_gather_rows

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter, fp32 and of its shape: the main copy and two moments."""

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


class ShardedAdam(DistributedOptimizer):
    """mcore's ZeRO-1 optimizer around a torch optimizer with Adam's state."""

    @torch.no_grad()
    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any]:
        """The whole fp32 state of each buffer, {buffer: {dtype: {key: [buffer's size]}}} on the CPU, on every rank.

        What mcore 0.16.1 puts together leaves out the padding between buckets, but its callers index with it: from the
        second bucket on (only with overlap_grad_reduce) they would save other parameters' numbers. Delete this method
        when `sharded_param_state_fully_reshardable` passes tests/parallel/test_overlap.py without it.
        """
        assert not use_gloo_comm and return_on_all_ranks, "only the calls of sharded_state_dict are served"
        group = self.data_parallel_group
        state: dict[Any, Any] = {}
        for number, (buffer, ranges_by_dtype) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
            ((dtype, ranges_of_buckets),) = ranges_by_dtype.items()
            whole = {key: torch.zeros(buffer.numel, dtype=torch.float32) for key in STATE_KEYS}
            for bucket, ranges in zip(buffer.buckets, ranges_of_buckets, strict=True):
                if empty_data:
                    break
                size = bucket.grad_data.numel()
                local = {key: bucket.grad_data.new_zeros(size // group.size()) for key in STATE_KEYS}
                for parameter, places in ranges["param_map"].items():
                    own = main_state(self, parameter)
                    for key in STATE_KEYS:
                        local[key][places["gbuf_local"].start : places["gbuf_local"].end] = own[key].flatten()
                for key, shard in local.items():
                    gathered = all_gather_rows(shard, group)
                    whole[key][bucket.offset : bucket.offset + size] = gathered.cpu()
            state[number] = {dtype: whole}
        return state

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        # mcore 0.16.1 also copies torch AdamW's "step", which the loaded tensors never hold (KeyError). Delete this
        # method when loading `fully_reshardable` state into torch.optim.AdamW works without it.
        for key, own in main_state(self, model_param).items():
            own.copy_(tensors[key])


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

    def sharded_state_dict(  # type: ignore[override]
        self, model_state: Mapping[str, Mapping[str, Sharded]], is_loading: bool = False
    ) -> dict[str, dict[int, dict[str, Sharded]]]:
        """Main parameters and moments of each tower in the shape of its parameters, for mcore's dist_checkpointing.

        Keys are `optimizer.state.<param|exp_avg|exp_avg_sq>.<parameter key>` whichever mcore optimizer is in use, so
        either reads the other's. Rates, decay and betas are not part of it: they come from the recipe. All ranks call
        it; saving gathers each tower over its data-parallel ranks (mcore's fully_reshardable).

        Args:
            model_state: {tower: {key: sharded tensor}}, whose data are the parameters themselves.
            is_loading: shapes only, to be read into.
        """
        state: dict[str, dict[int, dict[str, Sharded]]] = {}
        for tower, optimizer in self.optimizers.items():
            if isinstance(optimizer, DistributedOptimizer):
                # mcore looks parameters up in this dictionary by identity, in the order of its own buffers.
                state[tower] = optimizer.sharded_param_state_fully_reshardable(
                    dict(model_state[tower]), is_loading, metadata={}
                )
            else:
                state[tower] = self._whole_state(tower, model_state[tower])
        return state

    def _whole_state(self, tower: str, model_state: Mapping[str, Sharded]) -> dict[int, dict[str, Sharded]]:
        sharded = {id(value.data): value for value in model_state.values()}
        return {
            index: {
                key: _like(sharded[id(parameter)], f"optimizer.state.{key}", tensor)
                for key, tensor in main_state(self.optimizers[tower], parameter).items()
            }
            for index, parameter in enumerate(self.parameters[tower])
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Mapping[int, Mapping[str, Tensor]]], num_steps: int) -> None:  # type: ignore[override]
        """Take over what was read for `sharded_state_dict(..., is_loading=True)`, and the number of updates made.

        The model's parameters must have been loaded before: 16-bit ones are not rewritten from their main copy.
        """
        for tower, optimizer in self.optimizers.items():
            if isinstance(optimizer, DistributedOptimizer):
                optimizer.load_parameter_state_from_fully_reshardable(dict(state_dict[tower]))
            else:
                for index, parameter in enumerate(self.parameters[tower]):
                    for key, own in main_state(optimizer, parameter).items():
                        own.copy_(state_dict[tower][index][key])
            set_num_steps(optimizer.optimizer, num_steps)
        self.num_steps = num_steps


def _like(model_tensor: Sharded, prefix: str, data: Tensor) -> Sharded:
    changes: dict[str, Any] = {"key": f"{prefix}.{model_tensor.key}", "data": data}
    if isinstance(model_tensor, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(model_tensor, **changes)


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
