"""LAMB with the trust ratio of each whole tensor, however the tensors are cut: as EVA-CLIP used it, and the paper's."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from torch import Tensor

_CHUNK_NUMBERS = {"cpu": 1 << 18, "gpu": 1 << 26}
"""Numbers whose directions are computed together, in scratch memory: on a CPU what its caches hold, on a GPU more than
a kernel launch costs."""

_MULTI_TENSOR_PACKAGES = {"transformer_engine": "Transformer Engine", "apex": "apex"}


@dataclass(frozen=True)
class ShardMap:
    """Which whole tensor each optimizer parameter is a piece of, and over which ranks its norm is summed.

    Attributes:
        num_tensors: whole tensors of the tower on this pipeline rank, equal on every rank of `group`.
        tensor_index: 0..num_tensors-1 for each parameter this rank's optimizer holds.
        device: of the reduced sums; a rank may hold no parameter that would say.
        group: spans every piece of every tensor, of each equally often: a norm that counts a tensor twice does so on
            both sides of the ratio. None: this rank holds whole tensors.
    """

    num_tensors: int
    tensor_index: dict[Tensor, int]
    device: torch.device
    group: dist.ProcessGroup | None = None


class Lamb(torch.optim.AdamW):
    """Layer-wise adaptive moments. One step t = 1, 2, ... on an fp32 tensor p with gradient g:

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2

        form="eva"                                      form="lamb"
        u = m / (sqrt(v) + eps) + weight_decay p        u = m' / (sqrt(v') + eps) + weight_decay p
        c = clip(|p| / |u|, 0.01, 10)                   c = |p| / |u|
        p = p - lr sqrt(1 - b2^t) / (1 - b1^t) c u      p = p - lr c u

    with m' = m / (1 - b1^t), v' = v / (1 - b2^t), and c = 1 if either norm is 0. The trust ratio c applies to every
    tensor, also at weight decay 0. Norms are of the whole tensor: with a `ShardMap` the sums of squares of all pieces
    are added in fp64 over the ranks, in one small vector and one all-reduce a step; every rank must step. DeepSpeed
    under ZeRO takes the norm of a rank's flat partition instead, so its ratio depends on the number of GPUs; the
    formula is the same.

    A step leaves u in the gradients. It is a `torch.optim.AdamW` in its state only (exp_avg, exp_avg_sq), which mcore's
    distributed optimizer insists on.

    Sources: eva: DeepSpeed csrc/lamb/fused_lamb_cuda_kernel.cu, max_coeff 10 and min_coeff 0.01 as EVA-CLIP sets them
    (shinji/training/distributed.py). lamb: You et al. 2020, arXiv 1904.00962, algorithm 2 with phi the identity.
    """

    eva_ratios = (0.01, 10.0)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        form: Literal["eva", "lamb"] = "eva",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group["step"] = 0
        self.form = form
        self.shard_map: ShardMap | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. All ranks of the shard map's group call it together."""
        assert closure is None, "closures are not supported"
        params: list[Tensor] = []
        rates: list[float] = []
        squares: list[Tensor] = []
        for group in self.param_groups:
            group["step"] += 1
            here = [p for p in group["params"] if p.grad is not None]
            if not here:
                continue
            (b1, b2), t = group["betas"], group["step"]
            correction = math.sqrt(1.0 - b2**t) / (1.0 - b1**t) if self.form == "eva" else 1.0
            params += here
            rates += [group["lr"] * correction] * len(here)
            squares.append(self._gradients_to_directions(here, group))
        for p, rate, ratio in zip(params, rates, self._trust_ratios(params, squares), strict=True):
            assert p.grad is not None
            p.add_(p.grad, alpha=-rate * ratio)

    def _gradients_to_directions(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Moments updated, and each gradient replaced by its u; returns the sums of squares of (p, u), fp64 [P, 2].

        The kernel of torch's Adam(fused=True), one pass over memory on CPU and CUDA, adds the direction to zeros at
        rate -1. Its t only makes the bias corrections; at infinity there are none. (The public function around it takes
        as long as a chunk.)
        """
        flat = []
        for p in params:
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            assert p.grad is not None
            flat.append([tensor.view(-1) for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])])
        device = params[0].device
        limit = _CHUNK_NUMBERS["cpu" if device.type == "cpu" else "gpu"]
        scratch = torch.empty(min(limit, sum(p.numel() for p in params)), device=device)
        b1, b2 = group["betas"]
        adam_step = float(group["step"]) if self.form == "lamb" else math.inf
        squares, index = [], []
        for chunk in _chunks([p.numel() for p in params], limit):
            here, grads, first, second = ([flat[i][k][start:stop] for i, start, stop in chunk] for k in range(4))
            sizes = [p.numel() for p in here]
            directions = list(scratch[: sum(sizes)].zero_().split(sizes))
            steps = list(torch.full((len(chunk),), adam_step, device=device).unbind())
            torch._fused_adam_(
                directions, grads, first, second, [], steps, lr=-1.0, beta1=b1, beta2=b2, weight_decay=0.0,
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
            torch._foreach_copy_(grads, directions)
            if group["weight_decay"] != 0.0:
                torch._foreach_add_(grads, here, alpha=group["weight_decay"])
            squares.append(torch.stack([_square_sums(here), _square_sums(grads)], dim=1))
            index += [i for i, _, _ in chunk]
        sums = torch.zeros(len(params), 2, dtype=torch.float64, device=device)
        return sums.index_add_(0, torch.tensor(index, device=device), torch.cat(squares))

    def _trust_ratios(self, params: list[Tensor], squares: list[Tensor]) -> list[float]:
        """c of each parameter's whole tensor, from the sums of squares of this rank's pieces."""
        shards = self.shard_map
        if shards is None:
            if not params:
                return []
            shards = ShardMap(len(params), {p: i for i, p in enumerate(params)}, params[0].device)
        sums = torch.zeros(shards.num_tensors, 2, dtype=torch.float64, device=shards.device)
        if params:
            index = torch.tensor([shards.tensor_index[p] for p in params], device=shards.device)
            sums.index_add_(0, index, torch.cat(squares))
        if shards.group is not None and shards.group.size() > 1:
            dist.all_reduce(sums, group=shards.group)
        p_norm, u_norm = sums.sqrt().unbind(dim=1)
        ratio = p_norm / u_norm
        if self.form == "eva":
            ratio = ratio.clamp(*self.eva_ratios)
        ratios = torch.where((p_norm > 0) & (u_norm > 0), ratio, 1.0).tolist()
        return [ratios[shards.tensor_index[p]] for p in params]


def multi_tensor_package() -> str | None:
    """Whose multi-tensor kernels Megatron-core found: they take norms and clip gradients on CUDA. None: neither is
    installed. PyPI's `apex` is another package; what counts is NVIDIA's `amp_C`."""
    package = type(clip_grads.multi_tensor_applier).__module__.partition(".")[0]
    return _MULTI_TENSOR_PACKAGES.get(package)


def _chunks(sizes: list[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Lists of (tensor, start, stop) that cover flat tensors of these sizes, each list `limit` numbers at most."""
    chunk: list[tuple[int, int, int]] = []
    room = limit
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            chunk.append((i, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _square_sums(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each, fp64."""
    if not tensors[0].is_cuda:
        # On a CPU `_foreach_norm` adds one number after the other in fp32: 2e-4 off at 8 M elements, so that a tensor's
        # ratio would depend on how it is cut. `sum` adds pairwise.
        return torch.stack([tensor.square().sum() for tensor in tensors]).double()
    norms = torch.stack(torch._foreach_norm(tensors)) if multi_tensor_package() is None else _fused_norms(tensors)
    return norms.double().square()


def _fused_norms(tensors: list[Tensor]) -> Tensor:
    """By the package's `multi_tensor_l2norm(chunk size, overflow flag, [tensors], per_tensor)`: (total, one each)."""
    overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    _, norms = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [tensors], True)
    return norms
