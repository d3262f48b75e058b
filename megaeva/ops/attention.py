"""Self-attention straight from the output of the linear of q, k and v, rotary angles included."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.ops import DTYPES, accumulate_dtype, differentiate_once, native_devices

_NATIVE_DEVICES = native_devices("attention")


def attention(qkv_SBX: Tensor, num_heads: int, *, cos_sin: Tensor | None = None, causal: bool = False) -> Tensor:
    """Returns out_SBD = softmax(q k^T / sqrt(K)) v of every head, [S, B, A K], contiguous, of the input's dtype.

    Natively each head is taken out of `qkv_SBX`, turned and multiplied in the cache: no copy of q, k or v, and nothing
    of S x S, is ever in memory; the backward pass recomputes the weights from q, k and their log-sum-exp. Elsewhere,
    and for odd K, `reference` runs: the same definition, other summation order. Sums are float32 (float64 for float64);
    softmax weights are rounded to bf16 for bf16 input where the machine multiplies bf16.

    Args:
        qkv_SBX: [S, B, A * 3 * K], the rows [q, k, v] of head 0, then of head 1, ... as mcore's linear_qkv lays them.
        num_heads: A.
        cos_sin: of `rope2d.gather_angles`, float32 [2, S, B or 1, 1, K]: q and k are turned by it first, see `rotate`.
            It gets no gradient.
        causal: token i sees tokens 0 to i.

    The gradient is the exact derivative and is not scaled; it is defined once (no double backward). Every rank works on
    its own heads: no communication.
    """
    head_width = qkv_SBX.shape[-1] // (3 * num_heads)
    if qkv_SBX.device.type in _NATIVE_DEVICES and qkv_SBX.dtype in DTYPES and head_width % 2 == 0:
        angles = None if cos_sin is None else cos_sin.squeeze(3).contiguous()
        out_SBD, _ = torch.ops.megaeva.attention(qkv_SBX, angles, num_heads, causal)
        return out_SBD
    return reference(qkv_SBX, num_heads, cos_sin=cos_sin, causal=causal)


def reference(qkv_SBX: Tensor, num_heads: int, *, cos_sin: Tensor | None = None, causal: bool = False) -> Tensor:
    """out_SBD as `attention` defines it, in plain PyTorch."""
    query, key, value = qkv_SBX.unflatten(-1, (num_heads, 3, -1)).unbind(3)
    if cos_sin is not None:
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    if qkv_SBX.dtype == torch.bfloat16 and qkv_SBX.device.type == "cpu":
        # bf16 attention is slow on CPU: 15.9 ms with backward at demo size (64, 6, 17, 32), with these casts 1.9.
        query, key, value = query.float(), key.float(), value.float()
    out_BASK = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return out_BASK.to(qkv_SBX.dtype).permute(2, 0, 1, 3).flatten(2)


def rotate(x_SBAK: Tensor, cos_sin: Tensor) -> Tensor:
    """Returns x with each pair of neighbouring dims turned by its token's angle; computed in fp32, in x's dtype."""
    pairs = x_SBAK.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return torch.addcmul(x_SBAK * cos_sin[0], turned, cos_sin[1]).to(x_SBAK.dtype)


def _fake(qkv_SBX: Tensor, cos_sin: Tensor | None, num_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    torch._check(qkv_SBX.dim() == 3, lambda: "qkv_SBX must be [length, batch, heads * 3 * head width]")
    length, batch, features = qkv_SBX.shape
    wide = accumulate_dtype(qkv_SBX.dtype)
    return qkv_SBX.new_empty(length, batch, features // 3), qkv_SBX.new_empty(batch, num_heads, length, dtype=wide)


def _fake_backward(
    grad_out_SBD: Tensor,
    qkv_SBX: Tensor,
    cos_sin: Tensor | None,
    out_SBD: Tensor,
    log2_sum_BAS: Tensor,
    num_heads: int,
    causal: bool,
) -> Tensor:
    return qkv_SBX.new_empty(qkv_SBX.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, int, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv_SBX, cos_sin, ctx.num_heads, ctx.causal = inputs
    out_SBD, log2_sum_BAS = output
    ctx.mark_non_differentiable(log2_sum_BAS)
    ctx.save_for_backward(qkv_SBX, cos_sin, out_SBD, log2_sum_BAS)


def _backward(ctx: Any, grad_out_SBD: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
    qkv_SBX, cos_sin, out_SBD, log2_sum_BAS = ctx.saved_tensors
    grad_qkv_SBX = torch.ops.megaeva.attention_backward(
        grad_out_SBD, qkv_SBX, cos_sin, out_SBD, log2_sum_BAS, ctx.num_heads, ctx.causal
    )
    return grad_qkv_SBX, None, None, None


if _NATIVE_DEVICES:
    torch.library.register_fake("megaeva::attention", _fake)
    torch.library.register_fake("megaeva::attention_backward", _fake_backward)
    torch.library.register_autograd("megaeva::attention", _backward, setup_context=_setup_context)
    differentiate_once("attention")
