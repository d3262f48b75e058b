"""silu(gate) * up of one linear's output, in one pass over memory each way."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.ops import DTYPES, differentiate_once, native_devices

_NATIVE_DEVICES = native_devices("swiglu")


def swiglu(x: Tensor) -> Tensor:
    """Returns silu(x[..., :F]) * x[..., F:] for x [..., 2 F], contiguous, of x's dtype, rounded to it once.

    Where the extension has no kernel for the device, `reference` runs, which rounds silu first. Computed in float32
    (float64 for float64). The gradient is the exact derivative and is not scaled; it is defined once (no double
    backward). Source: Shazeer, GLU Variants Improve Transformer, equation 6, without biases.
    """
    if x.device.type in _NATIVE_DEVICES and x.dtype in DTYPES:
        y: Tensor = torch.ops.megaeva.swiglu(x)
        return y
    return reference(x)


def reference(x: Tensor) -> Tensor:
    """What `swiglu` returns, in plain PyTorch."""
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    grad_x: Tensor = torch.ops.megaeva.swiglu_backward(grad, *ctx.saved_tensors)
    return grad_x


if _NATIVE_DEVICES:
    torch.library.register_fake("megaeva::swiglu", _fake)
    torch.library.register_fake("megaeva::swiglu_backward", _fake_backward)
    torch.library.register_autograd("megaeva::swiglu", _backward, setup_context=_setup_context)
    differentiate_once("swiglu")
