"""Transformer Engine's linears, norms and attention with this project's calling convention, and its FP8.

The only module that imports Transformer Engine. Importing this one is a UserError where Transformer Engine does not
work, so nobody does it but on a branch that is for it. `make te-check` holds every name and argument used here to the
installed package; nothing here has run on a GPU.

Parameters have the names, shapes and attributes of the local spec's. `_extra_state`, in which Transformer Engine
pickles FP8 bookkeeping, is neither saved nor asked for by `checkpoint.pieces`; scales and histories are `run_state`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megaeva.config.schema import Fp8Section
from megaeva.errors import UserError
from megaeva.model.attributes import mark_sharded
from megaeva.model.sequence import pad_runs, unpad_runs
from megaeva.ops.attention import rotate
from megaeva.parallel.platform import chip, require_transformer_engine
from megaeva.parallel.wrap import Tower

require_transformer_engine()  # before what cannot be imported without it

# ruff: noqa: E402
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import autocast
from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub
from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    check_fp8_block_scaling_support,
    check_fp8_support,
    check_mxfp8_support,
    get_align_size_for_quantization,
)

__all__ = [
    "TENorm", "TransformerEngineAttention", "TransformerEngineColumn", "TransformerEngineRow", "check_chip",
    "overlap_started", "start_overlap", "te_recipe", "te_step",
]  # fmt: skip

_NO_RECIPE = recipes.DelayedScaling()  # of autocast(enabled=False), which otherwise looks for the chip's best
_MXFP8_OVERLAP_ROWS = 128  # of a rank: Transformer Engine gathers MXFP8 scales in whole tiles of so many

# -------------------------------------------------------------------------------------------------------------- FP8


@cache
def te_recipe(fp8: Fp8Section) -> Any:
    """Transformer Engine's recipe object, one and the same for equal sections."""
    fp8_format = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[fp8.format]
    if fp8.recipe == "delayed":
        return recipes.DelayedScaling(
            margin=fp8.margin,
            fp8_format=fp8_format,
            amax_history_len=fp8.amax_history,
            amax_compute_algo=fp8.amax_compute,
        )
    kinds = {
        "current": recipes.Float8CurrentScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
        "blockwise": recipes.Float8BlockScaling,
    }
    return kinds[fp8.recipe](fp8_format=fp8_format)


def check_chip(fp8: Fp8Section) -> None:
    """Nothing; asks Transformer Engine whether this GPU multiplies as the recipe says.

    Raises:
        UserError: it does not; names the chip and why.
    """
    checks = {"mxfp8": check_mxfp8_support, "blockwise": check_fp8_block_scaling_support}
    supported, reason = checks.get(fp8.recipe, check_fp8_support)()
    if not supported:
        raise UserError(
            f"train.precision=fp8 with train.fp8.recipe={fp8.recipe} cannot run on {chip()}; {reason.rstrip('.')}; "
            "use a recipe of this chip (delayed, current: 8.9 and later; blockwise: 9.0 and later; mxfp8: 10.x) or "
            "train.precision=bf16."
        )


def _not_in_fp8() -> AbstractContextManager[Any]:
    """Around what stays in the dtype of its parameters, be it inside a step or not."""
    return autocast(enabled=False, recipe=_NO_RECIPE) if FP8GlobalStateManager.is_fp8_enabled() else nullcontext()


@contextmanager
def te_step(towers: Sequence[Tower], fp8: Fp8Section) -> Iterator[None]:
    """One optimizer step in FP8, around all its passes. All ranks enter it together.

    Scales of recipe=delayed stand still in it; kernels keep the largest value of all its passes (an atomic maximum),
    and at the end each history gets that one entry, reduced over the ranks that hold a tower's stage. Left to itself
    Transformer Engine would close the gradients' entry in the first backward pass, of one microbatch of one tower.
    FP8 copies of the weights are made in the first pass; after one without gradients once more, transposed too.
    """
    linears = []
    for tower in towers:
        for module in tower.module.modules():
            if isinstance(module, _Linear):
                linears.append(module)
                module.amax_group = tower.grid.groups.tp_dp_cp
                module.is_first_microbatch = True
                module.disable_parameter_transpose_cache = False
    # The linears enter an autocast each; this one is around them all, so that none of theirs ends the step.
    step = autocast(enabled=True, recipe=te_recipe(fp8))
    step.__enter__()
    FP8GlobalStateManager.quantization_state.is_first_fp8_module = False
    for linear in linears:
        linear.take_up_run_state()
    try:
        yield
    except BaseException:
        with torch.no_grad():  # leaves without reducing anything: other ranks may not come
            step.__exit__(None, None, None)
        raise
    else:
        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        step.__exit__(None, None, None)  # reduces and updates what forward passes saw
    finally:
        for linear in linears:
            linear.disable_parameter_transpose_cache = True


# ------------------------------------------------------------------------------------------------- transfer overlap

# Transformer Engine keeps one set of buffers in a process, in its own global; this is their number of rows.
_overlap_rows: int | None = None


def start_overlap(
    *, length: int, batch: int, hidden_size: int, tp_size: int, dtype: torch.dtype, fp8: Fp8Section | None
) -> None:
    """Makes the buffers through which tp transfers overlap matrix products. All ranks call it, once in a process.

    Linears whose config has tp_comm_overlap use them, and can only be built afterwards; a pass over another number of
    rows goes without.

    Args:
        length: tokens of a sequence, padded to a multiple of tp.
        batch: samples of a microbatch.
        fp8: of the linears that use it; others beside them may be in `dtype`.
    """
    global _overlap_rows
    multiple = _row_multiple(fp8, overlap=True, sequence_parallel=True)
    run = length // tp_size * batch
    rows = tp_size * (run + -run % multiple)
    modes = [UserBufferQuantizationMode.NONE]
    if fp8 is not None:
        modes.append(UserBufferQuantizationMode.FP8)
    initialize_ub(
        shape=[rows, hidden_size], tp_size=tp_size, quantization_modes=modes, dtype=dtype, bootstrap_backend="nccl"
    )
    _overlap_rows = rows


def overlap_started() -> bool:
    """Whether `start_overlap` has made the buffers; linears that use them can be built only then."""
    return _overlap_rows is not None


def _row_multiple(fp8: Fp8Section | None, *, overlap: bool, sequence_parallel: bool) -> int:
    """What the rows of a rank are padded to."""
    multiple = 16 if overlap else 1
    if fp8 is None:
        return multiple
    if fp8.recipe == "mxfp8" and overlap:
        return _MXFP8_OVERLAP_ROWS
    if fp8.recipe == "blockwise" and sequence_parallel:
        return 128  # or it gathers in bf16 and quantises twice
    return max(multiple, get_align_size_for_quantization(te_recipe(fp8)))


# ---------------------------------------------------------------------------------------------------------- linears


_NUM_QUANTISED = {"fwd": 3, "bwd": 2}  # input, weight, output; gradients of output and input


class _Linear:
    """What this project's two linears do around Transformer Engine's."""

    amax_group: ProcessGroup | None = None
    """Over which largest values are reduced; `te_step` sets it."""
    # Transformer Engine's and mcore's:
    weight: nn.Parameter
    fp8_meta: dict[str, Any]
    init_fp8_meta_tensors: Callable[[Any], None]
    is_first_microbatch: bool
    disable_parameter_transpose_cache: bool

    def _start(self, fp8: Fp8Section | None, config: TransformerConfig) -> None:
        self._recipe = None if fp8 is None else te_recipe(fp8)
        overlap = config.tp_comm_overlap
        self._multiple = _row_multiple(fp8, overlap=overlap, sequence_parallel=config.sequence_parallel)
        self._overlap = {name: getattr(self, name) for name in _OVERLAPS} if overlap else {}
        # Outside a step FP8 copies of the weights are not kept: nobody says when the weights change.
        self.disable_parameter_transpose_cache = True
        self._run_state: dict[str, Tensor] = {}

    def run_state(self) -> dict[str, Tensor]:
        """Copies of what recipe=delayed goes on with, before the first step what it begins with.

        What is read into them counts from the next step on. See `checkpoint.pieces.run_state_pieces`.
        """
        if self._recipe is None or not self._recipe.delayed():
            return {}
        if "scaling_fwd" in self.fp8_meta:
            self._run_state = {name: buffer.clone() for name, buffer in self._fp8_buffers().items()}
        else:
            length, device = self._recipe.amax_history_len, self.weight.device
            for way, count in _NUM_QUANTISED.items():
                self._run_state[f"fp8_scale_{way}"] = torch.ones(count, device=device)
                self._run_state[f"fp8_history_{way}"] = torch.zeros(length, count, device=device)
        return self._run_state

    def fp8_amax(self) -> Tensor | None:
        """As `EmulatedFp8.fp8_amax`; of recipe=delayed, whose histories hold it from a length of 2 on."""
        if self._recipe is None or not self._recipe.delayed() or "scaling_fwd" not in self.fp8_meta:
            return None
        forward, backward = (self.fp8_meta[f"scaling_{way}"].amax_history for way in _NUM_QUANTISED)
        return torch.stack([forward[-1, 0], forward[-1, 1], backward[-1, 0]]) if len(forward) > 1 else None

    def take_up_run_state(self) -> None:
        """Puts into Transformer Engine's buffers what `run_state` gave out, inside an autocast with the recipe."""
        if not self._run_state:
            return
        if "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta.update(num_gemms=1, recipe=self._recipe)
            self.init_fp8_meta_tensors(self._recipe)
        for name, buffer in self._fp8_buffers().items():
            buffer.copy_(self._run_state[name])
        self._run_state = {}

    def _fp8_buffers(self) -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        for way in _NUM_QUANTISED:
            state = self.fp8_meta[f"scaling_{way}"]
            buffers |= {f"fp8_scale_{way}": state.scale, f"fp8_history_{way}": state.amax_history}
        return buffers

    def _context(self, in_fp8: bool) -> AbstractContextManager[Any]:
        if in_fp8:
            return autocast(enabled=True, recipe=self._recipe, amax_reduction_group=self.amax_group)
        return _not_in_fp8()

    def _multiply(self, x_SBX: Tensor, runs_in: int, runs_out: int) -> Tensor:
        """Transformer Engine's product with rows that it can take.

        Args:
            runs_in: ranks whose tokens `x_SBX` has, one after the other; each run of rows is padded for itself.
            runs_out: of the output.
        """
        in_fp8 = self._recipe is not None and self.training  # type: ignore[attr-defined]
        multiple = self._multiple if in_fp8 or self._overlap else 1
        padded = pad_runs(x_SBX, runs_in, multiple)
        if self._overlap:
            fits = padded.shape[:-1].numel() // runs_in * max(runs_in, runs_out) == _overlap_rows
            for name, wanted in self._overlap.items():
                setattr(self, name, wanted and fits)
        with self._context(in_fp8):
            out: Tensor = super().forward(padded)[0]  # type: ignore[misc]
        length = len(x_SBX) // runs_in * runs_out
        return out if padded is x_SBX else unpad_runs(out, runs_out, length, x_SBX.shape[1])


_OVERLAPS = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop", "ub_overlap_ag_dgrad")


class TransformerEngineColumn(_Linear, TEColumnParallelLinear):
    """As `linear.ColumnLinear`."""

    def __init__(
        self,
        *args: Any,
        config: TransformerConfig,
        bias: bool,
        stride: int = 1,
        fp8: Fp8Section | None = None,
        **kwargs: Any,
    ) -> None:
        shared = {"gather_output": False, "skip_bias_add": False, "is_expert": False}
        super().__init__(*args, config=config, bias=bias, stride=stride, **shared, **kwargs)
        mark_sharded(self.weight, 0, stride)
        if bias:
            mark_sharded(self.bias, 0, stride)
        self._start(fp8, config)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `ColumnLinear.forward`."""
        out = self._multiply(x, 1, self.tp_size if self.sequence_parallel else 1)
        return out if bias is None else out + bias


class TransformerEngineRow(_Linear, TERowParallelLinear):
    """As `linear.RowLinear`."""

    def __init__(
        self, *args: Any, config: TransformerConfig, bias: bool, fp8: Fp8Section | None = None, **kwargs: Any
    ) -> None:
        shared = {"input_is_parallel": True, "skip_bias_add": False, "is_expert": False}
        super().__init__(*args, config=config, bias=bias, **shared, **kwargs)
        mark_sharded(self.weight, 1)
        self._start(fp8, config)

    def forward(self, x: Tensor) -> Tensor:
        """As `RowLinear.forward`."""
        return self._multiply(x, self.tp_size if self.sequence_parallel else 1, 1)


# -------------------------------------------------------------------------------------------------------- attention


class TransformerEngineAttention(TEDotProductAttention):
    """As `attention.CoreAttention`, by whichever of flash and cuDNN's fused attention Transformer Engine picks.

    Rotary angles are applied before it: Transformer Engine's own know no angle for each token. It multiplies in bf16
    also inside an FP8 step.
    """

    def __init__(
        self, causal: bool, num_heads: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        # By its type alone Transformer Engine knows what is masked: no mask tensor, whose True would hide a token.
        self.mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
        self.num_heads_here = num_heads
        super().__init__(
            config=config,
            layer_number=1,  # it scales nothing
            attn_mask_type=self.mask_type,
            attention_type="self",
            pg_collection=pg_collection,
        )

    def forward(self, qkv_SBX: Tensor, rotary_cos_sin: Tensor | None) -> Tensor:
        """As `CoreAttention.forward`."""
        query, key, value = qkv_SBX.unflatten(-1, (self.num_heads_here, 3, -1)).unbind(3)
        if rotary_cos_sin is not None:
            query, key = rotate(query, rotary_cos_sin), rotate(key, rotary_cos_sin)
        with _not_in_fp8():
            out: Tensor = super().forward(query, key, value, attention_mask=None, attn_mask_type=self.mask_type)
        return out
