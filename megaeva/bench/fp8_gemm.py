"""The three products of an emulated FP8 linear beside mmaemu's, which returns the bits of an H100's tensor cores.

An H100 sums FP8 products with 13 bits below the largest of 32 and cuts off the rest; the rehearsal sums in fp32. So the
two differ wherever a sum needs more bits, and this prints by how much.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megaeva.config.schema import Fp8Section
from megaeva.errors import UserError
from megaeva.model.fp8 import EmulatedFp8
from megaeva.ops.fp8 import Quantised, transposed

SIZES = {
    "Demo-Student fc1": (130, 192, 768),
    "EVA02-CLIP-B-16 qkv": (197, 768, 2304),
    "EVA02-CLIP-L-14 proj": (257, 1024, 1024),
    "EVA-CLIP-18B qkv": (64, 5120, 1920),
}
"""(rows, input, output features) of linears; the last is a rank's at tp=8."""


@dataclass(frozen=True)
class Comparison:
    """One product.

    Attributes:
        name: "forward", "input gradient" or "weight gradient".
        length: numbers in a sum.
        equal: share of outputs with the same bits.
        units: largest difference in units in the last place of an output, which is taken to be no smaller than the root
            mean square of all: a sum that cancels has tiny ones.
        own_units: the same of outputs down to a hundredth of that.
        error: root mean square error against the exact sum, as a share of the H100's; NaN where neither has one.
    """

    name: str
    length: int
    equal: float
    units: float
    own_units: float
    error: float


def h100(a_MK: Quantised, b_KN: Quantised, *, fast: bool) -> Tensor:
    """The product in bf16 with an H100's bits.

    The sum is in one piece, as mmaemu has it of all `SIZES` of which it knows what cuBLAS does (sums of 1,024 on).

    Args:
        fast: fast accumulation, as Transformer Engine's forward pass asks for; the gradients' does not.

    Raises:
        UserError: mmaemu is not installed.
    """
    mmaemu = _mmaemu()
    rest = -a_MK.values.shape[1] % 16  # rows of a weight gradient's sum; zeros change nothing
    a, b = (F.pad(v.contiguous().view(torch.uint8), (0, rest)).view(v.dtype) for v in (a_MK.values, b_KN.values.T))
    out: Tensor = mmaemu.scaled_mm(
        a, b.t(), a_MK.inverse, b_KN.inverse, out_dtype=torch.bfloat16, use_fast_accum=fast, splitk=1,
        profile="hopper-te",
    )  # fmt: skip
    return out


def compare(
    recipe: Literal["current", "delayed"], rows: int, features: int, out_features: int, seed: int = 0
) -> list[Comparison]:
    """The three products of one linear.

    Args:
        recipe: current: of normal values. delayed: of whole numbers up to 3, with the scales of one that it begins
            with; their sums fit into the H100's 13 bits.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, scale: float) -> Tensor:
        if recipe == "delayed":
            return torch.randint(-3, 4, shape, generator=generator).bfloat16()
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    x, weight = values(rows, features, scale=1.0), values(out_features, features, scale=features**-0.5)
    gradient = values(rows, out_features, scale=1e-3)
    fp8 = EmulatedFp8(Fp8Section(recipe=recipe))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8(*leaves, None)
    out.backward(gradient)
    of_x, of_weight = (leaf.grad for leaf in leaves)
    assert of_x is not None and of_weight is not None
    x_q, w_q, g_q = (
        fp8.operands("input", x)[0],
        fp8.operands("weight", weight)[0],
        fp8.operands("gradient", gradient)[0],
    )
    return [
        _compared("forward", out.detach(), x_q, transposed(w_q), fast=True),
        _compared("input gradient", of_x, g_q, w_q, fast=False),
        _compared("weight gradient", of_weight, transposed(g_q), x_q, fast=False),
    ]


def report() -> Iterator[str]:
    """One line for each product of whole numbers, then of each of `SIZES`."""
    small = "Demo-Student fc1"
    cases = [(f"{small}, whole", compare("delayed", *SIZES[small]))]
    for name, comparisons in chain(cases, ((name, compare("current", *size)) for name, size in SIZES.items())):
        for c in comparisons:
            error = "both exact" if math.isnan(c.error) else f"error {c.error:.3f} of the H100's"
            yield (
                f"{name:23} {c.name:15} sums of {c.length:5,}: bits equal {c.equal:7.2%}; largest difference "
                f"{c.units:.2f} units in the last place of bf16 ({c.own_units:.0f} of outputs down to rms/100); {error}"
            )


def _compared(name: str, ours: Tensor, a: Quantised, b: Quantised, *, fast: bool) -> Comparison:
    theirs = h100(a, b, fast=fast)
    difference = (ours.float() - theirs.float()).abs()
    exact = (a.values.double() @ b.values.double()) * (a.inverse.double() * b.inverse.double())
    rms, size = exact.square().mean().sqrt().float(), theirs.float().abs()
    return Comparison(
        name,
        a.values.shape[1],
        (ours.view(torch.int16) == theirs.view(torch.int16)).double().mean().item(),
        (difference / _unit(size.maximum(rms))).max().item(),
        (difference / _unit(size))[size > rms / 100].max().item(),
        ((ours.double() - exact).norm() / (theirs.double() - exact).norm()).item(),
    )


def _unit(x: Tensor) -> Tensor:
    """Of bf16, in the last place of x > 0."""
    return torch.exp2(torch.floor(torch.log2(x)) - 7)


def _mmaemu() -> Any:
    try:
        import mmaemu
    except ImportError as error:
        raise UserError("the H100's bits come from mmaemu, which is not installed; pip install mmaemu.") from error
    return mmaemu
