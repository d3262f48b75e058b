"""LayerNorm over the last dim, one read of each row forward and one backward."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.ops import DTYPES, accumulate_dtype, differentiate_once, native_devices

_NATIVE_DEVICES = native_devices("layer_norm")


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
    """Returns (x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim D, contiguous, of x's dtype.

    Moments, and the sums of the gradients of weight and bias, are float32 (float64 for float64). Where the extension
    has no kernel for the device, or the parameters are of another dtype than x, `reference` runs: the same definition,
    other summation order. The gradient is the exact derivative and is not scaled; it is defined once (no double
    backward).
    """
    native = x.device.type in _NATIVE_DEVICES and x.dtype in DTYPES
    if native and weight_D.dtype == bias_D.dtype == x.dtype:
        y, _, _ = torch.ops.megaeva.layer_norm(x, weight_D, bias_D, epsilon)
        return y
    return reference(x, weight_D, bias_D, epsilon)


def reference(x: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float) -> Tensor:
    """What `layer_norm` returns, in plain PyTorch."""
    return functional.layer_norm(x, weight_D.shape, weight_D, bias_D, epsilon)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    rows = math.prod(x.shape[:-1])  # not Size.numel, which would fix a symbolic batch
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.megaeva.layer_norm_backward(grad, *ctx.saved_tensors), None


if _NATIVE_DEVICES:
    torch.library.register_fake("megaeva::layer_norm", _fake)
    torch.library.register_fake("megaeva::layer_norm_backward", _fake_backward)
    torch.library.register_autograd("megaeva::layer_norm", _backward, setup_context=_setup_context)
    differentiate_once("layer_norm")
