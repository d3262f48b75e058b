"""LAMB as EVA-CLIP was trained with it: DeepSpeed's FusedLamb, with a trust ratio of each whole tensor."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ShardMap:
    """Which whole tensor each optimizer parameter is a piece of, and over which ranks its norm is summed.

    Attributes:
        num_tensors: whole tensors of the tower on this pipeline rank, equal on every rank of `group`.
        tensor_index: 0..num_tensors-1 for each parameter this rank's optimizer holds.
        device: of the reduced sums; a rank may hold no parameter that would say.
        not_counted: parameters that another rank of `group` holds as well; it counts them in the sums.
        group: spans every piece of every tensor; None: this rank holds whole tensors.
    """

    num_tensors: int
    tensor_index: dict[Tensor, int]
    device: torch.device
    not_counted: frozenset[Tensor] = frozenset()
    group: dist.ProcessGroup | None = None


class Lamb(torch.optim.AdamW):
    """Layer-wise adaptive moments. One step t = 1, 2, ... on a tensor p with gradient g:

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2            (not bias-corrected)
        u = m / (sqrt(v) + eps) + weight_decay p
        c = clip(|p| / |u|, 0.01, 10), or 1 if either norm is 0
        p = p - lr sqrt(1 - b2^t) / (1 - b1^t) c u

    The trust ratio c applies to every tensor, also at weight decay 0. Norms are of the whole tensor: with a `ShardMap`
    the sums of squares of all pieces are added in fp64 over the ranks, one small vector a step; every rank must step.
    DeepSpeed under ZeRO takes the norm of a rank's flat partition instead, so its ratio depends on the number of GPUs;
    the formula is the same. Extra memory: one copy of this rank's parameters during the step.

    It is a `torch.optim.AdamW` in its state only (exp_avg, exp_avg_sq), which mcore's distributed optimizer insists on.

    Source: DeepSpeed csrc/lamb/fused_lamb_cuda_kernel.cu, max_coeff 10 and min_coeff 0.01 as EVA-CLIP sets them
    (shinji/training/distributed.py).
    """

    min_trust_ratio = 0.01
    max_trust_ratio = 10.0

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
        for group in self.param_groups:
            group["step"] = 0
        self.shard_map: ShardMap | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. All ranks of the shard map's group call it together."""
        assert closure is None, "closures are not supported"
        params: list[Tensor] = []
        updates: list[Tensor] = []
        rates: list[float] = []
        for group in self.param_groups:
            group["step"] += 1
            here = [p for p in group["params"] if p.grad is not None]
            if not here:
                continue
            (b1, b2), t = group["betas"], group["step"]
            params += here
            updates += self._directions(here, group)
            rates += [group["lr"] * math.sqrt(1.0 - b2**t) / (1.0 - b1**t)] * len(here)
        ratios = self._trust_ratios(params, updates)
        if params:
            torch._foreach_mul_(updates, [-rate * ratio for rate, ratio in zip(rates, ratios, strict=True)])
            torch._foreach_add_(params, updates)

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter, moments updated in place."""
        grads: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            assert p.grad is not None
            grads.append(p.grad)
            first.append(state["exp_avg"])
            second.append(state["exp_avg_sq"])
        b1, b2 = group["betas"]
        torch._foreach_mul_(first, b1)
        torch._foreach_add_(first, grads, alpha=1.0 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1.0 - b2)
        denominators = list(torch._foreach_sqrt(second))
        torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(first, denominators))
        if group["weight_decay"] != 0.0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return updates

    def _trust_ratios(self, params: list[Tensor], updates: list[Tensor]) -> list[float]:
        """c of each parameter's whole tensor."""
        shards = self.shard_map
        if shards is None:
            if not params:
                return []
            shards = ShardMap(len(params), {p: i for i, p in enumerate(params)}, params[0].device)
        sums = torch.zeros(shards.num_tensors, 2, dtype=torch.float64, device=shards.device)
        if params:
            squares = torch.stack([_square_sums(x) for x in (params, updates)], dim=1)
            counted = torch.tensor([p not in shards.not_counted for p in params], device=shards.device)
            index = torch.tensor([shards.tensor_index[p] for p in params], device=shards.device)
            sums.index_add_(0, index, squares * counted[:, None])
        if shards.group is not None and shards.group.size() > 1:
            dist.all_reduce(sums, group=shards.group)
        p_norm, u_norm = sums.sqrt().unbind(dim=1)
        ratio = (p_norm / u_norm).clamp(self.min_trust_ratio, self.max_trust_ratio)
        ratios = torch.where((p_norm > 0) & (u_norm > 0), ratio, 1.0).tolist()
        return [ratios[shards.tensor_index[p]] for p in params]


def _square_sums(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each, fp64."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).double().square()
    # On a CPU `_foreach_norm` adds one number after the other in fp32: 2e-4 off at 8 M elements, so that a tensor's
    # ratio would depend on how it is cut. `sum` adds pairwise.
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).double()
