"""LayerNorm and RMSNorm with fp32 moments, over a whole or a tensor-parallel last dim."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaeva.model.attributes import mark_sharded
from megaeva.ops.layer_norm import layer_norm


class _RMS(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * weight in fp32; by hand, which took 0.4 of F.rms_norm's time on CPU at demo size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        # T5 and EVA round to the weight's dtype before the weight is applied.
        return (x32 * scale).to(weight.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].float()
        normed = x.float() * scale
        weighted = grad * weight
        mean = torch.linalg.vecdot(weighted, normed).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(weighted, normed, mean, value=-1).mul_(scale)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _Sharded(torch.autograd.Function):
    """A norm over a last dim of which each rank of `group` holds an equal piece; weight and bias are pieces too.

    One all-gather of the pieces' moments forward and one all-reduce of two sums backward, both S x B x 2 numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, group: dist.ProcessGroup
    ) -> Tensor:
        x32 = x.float()
        size = group.size()
        if bias is None:  # RMS: the second moment about zero
            mean = None
            variance = x32.square().mean(-1, keepdim=True)
            dist.all_reduce(variance, group=group)
            variance /= size
            centred = x32
        else:
            # Each piece about its own mean, joined exactly (Chan et al.): no difference of large squares.
            local_variance, local_mean = torch.var_mean(x32, -1, correction=0, keepdim=True)
            local = torch.stack([local_mean, local_variance])
            pieces = local.new_empty(size, *local.shape)
            dist.all_gather(list(pieces.unbind()), local, group=group)
            means, variances = pieces.unbind(1)
            mean = means.mean(0)
            variance = variances.mean(0) + (means - mean).square().mean(0)
            centred = x32 - mean
        scale = torch.rsqrt(variance + epsilon)
        normed = centred * scale
        ctx.save_for_backward(normed, weight, scale)
        ctx.group, ctx.has_bias, ctx.dtype = group, bias is not None, x.dtype
        if bias is None:
            return normed.to(weight.dtype) * weight
        return torch.addcmul(bias.float(), normed, weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        normed, weight, scale = ctx.saved_tensors
        grad = grads[0].float()
        weighted = grad * weight
        sums = torch.stack([weighted.sum(-1, keepdim=True), (weighted * normed).sum(-1, keepdim=True)])
        dist.all_reduce(sums, group=ctx.group)
        mean, mean_normed = (sums / (normed.shape[-1] * ctx.group.size())).unbind()
        grad_x = weighted - normed * mean_normed
        if ctx.has_bias:
            grad_x -= mean
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_bias = grad.flatten(0, -2).sum(0).to(weight.dtype) if ctx.has_bias else None
        return (grad_x * scale).to(ctx.dtype), grad_weight, grad_bias, None, None


class Norm(nn.Module):
    """config.normalization over the last dim: "LayerNorm" (weight and bias) or "RMSNorm" (weight only, T5 style).

    Moments are fp32 whatever the input. Under sequence parallelism its parameters are marked `sequence_parallel`, so
    that mcore sums their gradients over tp. Source: EVA-CLIP's LayerNorm and RMSnorm, shinji/eva_clip.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        is_layernorm = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.empty_like(self.weight)) if is_layernorm else None
        self.epsilon = eps
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x, in its dtype."""
        if self.bias is None:
            normed: Tensor = _RMS.apply(x, self.weight, self.epsilon)
            return normed
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class ShardedNorm(Norm):
    """The same norm over a last dim that is cut over tp (sub-LN); `hidden_size` is that of all ranks together."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, pg_collection: ProcessGroupCollection
    ) -> None:
        self._group = pg_collection.tp
        size = 1 if self._group is None else self._group.size()
        super().__init__(config, hidden_size // size, eps)
        self._alone = size == 1
        for param in self.parameters():
            mark_sharded(param, 0)
            param.sequence_parallel = False  # type: ignore[attr-defined]  # each rank's piece is its own

    def forward(self, x: Tensor) -> Tensor:
        """Returns this rank's piece of the normalised x; all tp ranks must call it."""
        if self._alone:
            return super().forward(x)
        normed: Tensor = _Sharded.apply(x, self.weight, self.bias, self.epsilon, self._group)
        return normed


def build_inner_norm(
    spec: type | ModuleSpec | None, config: TransformerConfig, width: int, pg_collection: ProcessGroupCollection
) -> nn.Module | None:
    """Returns the sub-LN of an attention or MLP over its inner `width` (of all tp ranks together); None without one."""
    if spec is None:
        return None
    norm: nn.Module = build_module(
        spec, config=config, hidden_size=width, eps=config.layernorm_epsilon, pg_collection=pg_collection
    )
    return norm
