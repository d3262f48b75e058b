"""FP8 quantisation and products in plain PyTorch, number for number as Transformer Engine 2.20 defines its recipes.

E4M3 is torch.float8_e4m3fn (largest 448), E5M2 torch.float8_e5m2 (largest 57344). A value x is stored as
cast(x * scale) and read as value * (1 / scale); scales are fp32. Nothing here has a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_DECODED = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in (E4M3, E5M2)}


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8.

    Attributes:
        values: [R, C], E4M3 or E5M2.
        inverse: fp32; 0-dim for the whole matrix, or [ceil(R / block[0]), ceil(C / block[1])].
        block: rows and columns that share a scale; None: the whole matrix does.
    """

    values: Tensor
    inverse: Tensor
    block: tuple[int, int] | None = None

    def dequantised(self) -> Tensor:
        """[R, C] fp32."""
        values, inverse = decoded(self.values), self.inverse
        if self.block is not None:
            inverse = inverse.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
            inverse = inverse[: values.shape[0], : values.shape[1]]
        return values * inverse


def largest(dtype: torch.dtype) -> float:
    """448 or 57344."""
    return torch.finfo(dtype).max


def amax(x: Tensor) -> Tensor:
    """Largest absolute value (0-dim fp32); 0 of nothing."""
    return x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in FP8, to nearest even; what lies beyond the largest value becomes it, infinities too (CUDA's SATFINITE)."""
    return x.float().clamp(-largest(dtype), largest(dtype)).to(dtype)


def decoded(values_RC: Tensor) -> Tensor:
    """FP8 in fp32, by a table: five times as fast on a CPU as torch's cast."""
    if not values_RC.is_contiguous():
        return decoded(values_RC.T).T if values_RC.T.is_contiguous() else decoded(values_RC.contiguous())
    table = _DECODED[values_RC.dtype].to(values_RC.device)
    return table.index_select(0, values_RC.view(torch.uint8).view(-1).int()).view(values_RC.shape)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
    """The matrix with one given scale (0-dim fp32)."""
    return Quantised(cast(x.float() * scale, dtype), scale.reciprocal())


def current_scale(amax: Tensor, dtype: torch.dtype, *, of: torch.dtype, power_of_two: bool = False) -> Tensor:
    """largest / amax; 1 where amax is 0, infinite or NaN. Any shape.

    Source: TE's recipe_common.cuh, `compute_scale_from_amax`, with its default epsilon of 0.

    Args:
        of: dtype of what is quantised: its largest value stands for a scale that fp32 cannot hold.
        power_of_two: rounded down to one.
    """
    scale = torch.full_like(amax, largest(dtype)) / amax  # torch divides a Python number by rounding twice
    scale = torch.where(scale.isinf(), torch.finfo(of).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def delayed_scale(
    history_LN: Tensor,
    amax_N: Tensor,
    scale_N: Tensor,
    largest_N: Tensor,
    *,
    margin: int = 0,
    algorithm: Literal["max", "most_recent"] = "max",
) -> tuple[Tensor, Tensor]:
    """The (history, scale) of the next step after one whose largest values were `amax_N`; new tensors.

    The scale is largest / 2^margin / amax, with the newest amax or the largest of the last L. It stays as it was where
    that is 0 or not finite, and is at most fp32's largest value. As in TE the history's first row is the free place of
    the step to come, so the newest is the last row.

    Source: TE's delayed_scaling.cu.
    """
    latest_LN = torch.cat([history_LN[1:], amax_N[None]])
    amax = amax_N if algorithm == "most_recent" else latest_LN.amax(0)
    scale = (largest_N * 2.0**-margin / amax).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where(amax.isfinite() & (amax > 0), scale, scale_N)
    latest_LN[0] = 0.0
    return latest_LN, scale


def quantise_blocks(
    x: Tensor, block: tuple[int, int], dtype: torch.dtype, scale_of: Callable[[Tensor], Tensor]
) -> Quantised:
    """The matrix with a scale for each block of rows x columns; the last blocks may be smaller.

    Args:
        scale_of: (amax of each block) -> its scale, both fp32 of one shape.
    """
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale = scale_of(blocks.abs().amax((1, 3)))
    values = cast(blocks * scale[:, None, :, None], dtype).view(padded.shape)[:rows, :columns]
    return Quantised(values.contiguous(), scale.reciprocal(), block)


def mx_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that E8M0 holds for a block of MXFP8: 1 / 2^ceil(log2(amax / largest)). Any shape.

    An amax of 0 has 2^127, an infinite one 2^-127, NaN NaN.
    Source: TE's ptx_arch_spec.cuh `float_to_e8m0` and ptx.cuh `exp2f_rcp`.
    """
    bits = (amax * torch.tensor(1.0 / largest(dtype))).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(amax.isinf(), 0xFE, exponent + up)
    reciprocal = torch.where(exponent == 0xFE, 0x00400000, (254 - exponent) << 23)
    return torch.where(amax.isnan(), torch.nan, reciprocal.view(torch.float32))


def accumulated(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """The sum of products of two FP8 matrices [M, N] fp32, without scales; a tensor core truncates on the way."""
    return decoded(a_MK) @ decoded(b_KN)


def product(a_MK: Quantised, b_KN: Quantised, dtype: torch.dtype, bias_N: Tensor | None = None) -> Tensor:
    """a b + bias [M, N] in `dtype`, accumulated in fp32 and rounded once.

    Scales of whole matrices multiply the sum of unscaled products, as cuBLAS does; those of blocks the factors.
    """
    if a_MK.block is None and b_KN.block is None:
        out = accumulated(a_MK.values, b_KN.values) * (a_MK.inverse * b_KN.inverse)
    else:
        out = a_MK.dequantised() @ b_KN.dequantised()
    return (out if bias_N is None else out + bias_N).to(dtype)


def transposed(q: Quantised) -> Quantised:
    """The transposed matrix, a view."""
    if q.block is None:
        return Quantised(q.values.T, q.inverse)
    return Quantised(q.values.T, q.inverse.T, q.block[::-1])
