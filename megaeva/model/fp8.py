"""The FP8 rehearsal: products of the local linears as a GPU with Transformer Engine would round them, on any machine.

One optimizer step is one `fp8_step`: weights are quantised once in it, and with recipe=delayed scales stand still and
its largest values become one entry of the histories. So a forward pass that a step repeats gives the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaeva.config.fp8 import REHEARSE
from megaeva.config.schema import Fp8Section
from megaeva.errors import UserError
from megaeva.ops.fp8 import (
    E4M3,
    E5M2,
    Quantised,
    amax,
    current_scale,
    delayed_scale,
    largest,
    mx_scale,
    product,
    quantise,
    quantise_blocks,
    transposed,
)
from megaeva.parallel.wrap import Tower

Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
_Both = tuple[Quantised, Quantised]


class EmulatedFp8(nn.Module):
    """The products of one linear in training. It has no parameter and no buffer, whatever holds it is saved without.

    Attributes:
        scale: [3] fp32, of input, weight and gradient of the output; of recipe=delayed.
        history: [amax_history, 3] fp32, see `delayed_scale`.
        amax: [3] fp32, largest values of the step so far; of the whole last step, on all ranks, between two.
        filled: [3] fp32, of recipe=delayed: the same as shares of what FP8 held at the last step's scales; above 1 was
            cut off.
    """

    def __init__(self, section: Fp8Section) -> None:
        super().__init__()
        self.section = section
        gradient = E5M2 if section.format == "hybrid" else E4M3
        self.dtypes: dict[Role, torch.dtype] = {"input": E4M3, "weight": E4M3, "gradient": gradient}
        length = section.amax_history if section.recipe == "delayed" else 0
        cpu = torch.device("cpu")  # whatever the tower is being built on
        self.scale, self.amax, self.filled = (torch.full((3,), x, device=cpu) for x in (1.0, 0.0, 0.0))
        self.history = torch.zeros(length, 3, device=cpu)
        self._in_step = False
        self._kept_weight: _Both | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias [..., out], and its three products in FP8; the bias' gradient is of what is not quantised.

        Products come in x's dtype, accumulated in fp32. Source: TE's module/linear.py.
        """
        out: Tensor = _Linear.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return out

    def operands(self, role: Role, x_RC: Tensor) -> _Both:
        """`x_RC` quantised for a sum over columns, and for one over rows; one object where that is the same."""
        dtype, place = self.dtypes[role], ROLES.index(role)
        largest_value = amax(x_RC)
        self.amax[place] = torch.maximum(self.amax[place], largest_value)
        if self.section.recipe == "delayed":
            return (quantised := quantise(x_RC, self.scale[place], dtype)), quantised
        if self.section.recipe == "current":
            scale = current_scale(largest_value, dtype, of=x_RC.dtype)
            return (quantised := quantise(x_RC, scale, dtype)), quantised
        if self.section.recipe == "mxfp8":
            scale_of = partial(mx_scale, dtype=dtype)
            return quantise_blocks(x_RC, (1, 32), dtype, scale_of), quantise_blocks(x_RC, (32, 1), dtype, scale_of)
        scale_of = partial(current_scale, dtype=dtype, of=x_RC.dtype, power_of_two=True)
        if role == "weight":
            return (quantised := quantise_blocks(x_RC, (128, 128), dtype, scale_of)), quantised
        return quantise_blocks(x_RC, (1, 128), dtype, scale_of), quantise_blocks(x_RC, (128, 1), dtype, scale_of)

    def weight_operands(self, weight: Tensor) -> _Both:
        """As `operands`; made once in an optimizer step."""
        if self._kept_weight is not None:
            return self._kept_weight
        both = self.operands("weight", weight.detach())
        if self._in_step:
            self._kept_weight = both
        return both

    def run_state(self) -> dict[str, Tensor]:
        """What a resumed run continues with; empty but for recipe=delayed."""
        return {"fp8_scale": self.scale, "fp8_history": self.history} if self.section.recipe == "delayed" else {}

    def fp8_amax(self) -> Tensor:
        """Largest values of the last step on all ranks [3] fp32: of input, weight and gradient of the output."""
        return self.amax

    def begin_step(self) -> None:
        """What the passes from now on see is one step."""
        self.amax = torch.zeros_like(self.amax)
        self._in_step = True

    def leave_step(self) -> None:
        """The weights may change."""
        self._in_step, self._kept_weight = False, None

    def end_step(self, amax_3: Tensor) -> None:
        """Scales of the next step, from the largest values of this one on all ranks. Tensors are replaced: a save in
        flight has the old ones."""
        self.amax = amax_3
        if self.section.recipe == "delayed":
            largest_3 = torch.tensor([largest(self.dtypes[role]) for role in ROLES])
            self.filled = amax_3 * self.scale / largest_3
            self.history, self.scale = delayed_scale(
                self.history,
                amax_3,
                self.scale,
                largest_3,
                margin=self.section.margin,
                algorithm=self.section.amax_compute,
            )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp8: EmulatedFp8) -> Tensor:
        forward_x, backward_x = fp8.operands("input", x.reshape(-1, x.shape[-1]))
        forward_weight, backward_weight = fp8.weight_operands(weight)
        ctx.fp8, ctx.has_bias, ctx.dtype = fp8, bias is not None, weight.dtype
        ctx.blocks = backward_x.block, backward_weight.block
        ctx.save_for_backward(backward_x.values, backward_x.inverse, backward_weight.values, backward_weight.inverse)
        out = product(forward_x, transposed(forward_weight), x.dtype, bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_values, x_inverse, weight_values, weight_inverse = ctx.saved_tensors
        x_block, weight_block = ctx.blocks
        gradient_RN = gradient.reshape(-1, gradient.shape[-1])
        over_features, over_rows = ctx.fp8.operands("gradient", gradient_RN)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = Quantised(weight_values, weight_inverse, weight_block)
            of_x = product(over_features, weight, gradient.dtype).view(*gradient.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_weight = product(transposed(over_rows), Quantised(x_values, x_inverse, x_block), ctx.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient_RN.sum(0)
        return of_x, of_weight, of_bias, None


def require_fp8(fp8: Fp8Section | None, layer_spec: Literal["local", "te"]) -> None:
    """Nothing, where this machine multiplies as the recipe says or may emulate it.

    Raises:
        UserError: a CPU without train.fp8.rehearse; a GPU that is too old for the recipe.
    """
    if fp8 is None:
        return
    if layer_spec == "te":
        from megaeva.model.transformer_engine import check_chip  # imports Transformer Engine

        check_chip(fp8)
    elif not fp8.rehearse:
        raise UserError(f"train.precision=fp8 on a CPU, which has no FP8; a GPU must run it: {REHEARSE}.")


def fp8_linears(module: nn.Module) -> list[EmulatedFp8]:
    """What emulates FP8 in the module, in its order."""
    return [part for part in module.modules() if isinstance(part, EmulatedFp8)]


@contextmanager
def fp8_step(towers: Sequence[Tower], fp8: Fp8Section | None, layer_spec: Literal["local", "te"]) -> Iterator[None]:
    """Around the passes of one optimizer step. All ranks enter it; nothing happens where `fp8` is None.

    At its end the largest values are reduced over the ranks that hold pieces and copies of each tower's stage, so
    scales are the same on all of them: one collective of three numbers a linear for each tower.
    """
    if fp8 is None:
        yield
        return
    if layer_spec == "te":
        from megaeva.model.transformer_engine import te_step  # imports Transformer Engine

        with te_step(towers, fp8):
            yield
        return
    linears = [(tower, fp8_linears(tower.module)) for tower in towers]
    try:
        for _, in_tower in linears:
            for linear in in_tower:
                linear.begin_step()
        yield
    finally:
        for _, in_tower in linears:
            for linear in in_tower:
                linear.leave_step()
    for tower, in_tower in linears:
        if in_tower:
            largest_n3 = torch.stack([linear.amax for linear in in_tower])
            dist.all_reduce(largest_n3, dist.ReduceOp.MAX, group=tower.grid.groups.tp_dp_cp)
            for linear, largest_3 in zip(in_tower, largest_n3, strict=True):
                linear.end_step(largest_3)


def fp8_figures(towers: Sequence[Tower]) -> dict[str, float]:
    """For each tower and role the largest value that the last step quantised, on all ranks of this pipeline stage.

    Emulated with recipe=delayed also as a share of what FP8 held at that step's scales: above 1 values were cut off.
    Transformer Engine keeps such values with recipe=delayed alone.
    """
    figures: dict[str, float] = {}
    for tower in towers:
        asked = [part.fp8_amax() for part in tower.module.modules() if hasattr(part, "fp8_amax")]
        kinds = {"fp8_amax": [amax_3 for amax_3 in asked if amax_3 is not None]}
        kinds["fp8_filled"] = [part.filled for part in fp8_linears(tower.module) if part.section.recipe == "delayed"]
        for kind, values in kinds.items():
            if values:
                largest_3 = torch.stack(values).amax(0).tolist()
                figures |= {f"{kind}/{tower.name}/{role}": x for role, x in zip(ROLES, largest_3, strict=True)}
    return figures
