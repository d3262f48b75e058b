"""Transformer Engine's modules on a CPU: its device checks answered, and where a test asks for it its kernels replaced.

Constructors, arguments, FP8 bookkeeping and Megatron-core's wrappers are the real ones. What is replaced are products,
norms and attention, by plain PyTorch of the same definition.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megaeva.parallel.grid import Grid
from tests.helpers.tiny import single_grid


@cache
def one_grid() -> Grid:
    """The grid of this process, made once: each has process groups, and those hold threads."""
    return single_grid()


@contextmanager
def constructible() -> Iterator[None]:
    """Lets Transformer Engine's modules be built, on the CPU, as on an H100."""
    cpu = torch.device("cpu")
    answers = {
        "is_available": True, "current_device": cpu, "get_device_capability": (9, 0), "get_device_name": "H100 (mock)",
        "get_device_properties": SimpleNamespace(major=9, minor=0, name="H100 (mock)"),
        "is_current_stream_capturing": False, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer)))
        # Asks the accelerator that was just invented.
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"))
        yield


def _linear(self: Any, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
    """te.pytorch.Linear.forward by what it promises: transfers, product, bias."""
    calls = self.__dict__.setdefault("calls", [])
    calls.append(_state(x, is_first_microbatch))
    return _parallel_product(self, x, self.weight, self.bias if self.use_bias else None)


def _parallel_product(what: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Transfers and product of a linear; `what` has its parallel mode and group."""
    group, together = what.tp_group, what.tp_size > 1
    if what.parallel_mode == "column" and together:
        gather = mappings.gather_from_sequence_parallel_region
        x = (gather if what.sequence_parallel else mappings.copy_to_tensor_model_parallel_region)(x, group=group)
    if what.parallel_mode == "column" or not together:
        return F.linear(x, weight, bias)
    scatter = mappings.reduce_scatter_to_sequence_parallel_region
    add = scatter if what.sequence_parallel else mappings.reduce_from_tensor_model_parallel_region
    out = add(F.linear(x, weight), group=group)
    return out if bias is None else out + bias


def _state(x: Tensor, is_first_microbatch: bool | None) -> dict[str, Any]:
    """What a product would see of Transformer Engine's global state."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    return {
        "rows": x.shape[:-1].numel(), "first": is_first_microbatch, "fp8": State.is_fp8_enabled(),
        "recipe": State.get_fp8_recipe() if State.is_fp8_enabled() else None, "group": State.get_fp8_group(),
        "grad": torch.is_grad_enabled(),
    }  # fmt: skip


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def _attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, attn_mask_type: str
) -> Tensor:
    """te.pytorch.DotProductAttention.forward in its default layout, sbhd."""
    assert self.qkv_format == "sbhd" and attention_mask is None
    assert query.shape[2] == self.num_attention_heads // self.tp_size
    causal = {"causal": True, "no_mask": False}[attn_mask_type]
    batch_first = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    out = F.scaled_dot_product_attention(*batch_first, is_causal=causal, scale=self.softmax_scale)
    return out.permute(2, 0, 1, 3).flatten(2)


@contextmanager
def computable() -> Iterator[None]:
    """`constructible`, and Transformer Engine's products, norms and attention in plain PyTorch."""
    import transformer_engine.pytorch as te

    replaced = {
        te.Linear: _linear, te.LayerNorm: _layer_norm, te.RMSNorm: _rms_norm, te.DotProductAttention: _attention,
    }  # fmt: skip
    with constructible(), ExitStack() as stack:
        for owner, forward in replaced.items():
            stack.enter_context(mock.patch.object(owner, "forward", forward))
        yield


class _Observed(torch.autograd.Function):
    """Leaves the largest gradient where the cast of the gradient to FP8 would, and reduces as `linear._Linear` does."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, quantizer: Any) -> Tensor:
        from transformer_engine.pytorch.module import linear

        ctx.quantizer, ctx.reduces = quantizer, linear._check_fp8_reduce_and_update()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        _observe(ctx.quantizer, grad)
        if ctx.reduces:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return grad, None


def _observe(quantizer: Any, x: Tensor) -> None:
    quantizer.amax.copy_(torch.maximum(quantizer.amax, x.detach().abs().max()))


def _product(
    weight: Tensor, x: Tensor, bias: Tensor | None, args: Any, is_grad_enabled: bool
) -> tuple[Tensor, Tensor | None]:
    """`_linear_eager`: a product not quantised, with the largest values that its casts would leave."""
    workspace = None
    if args.fp8:
        from transformer_engine.pytorch.module.linear import assert_dim_for_fp8_exec

        assert_dim_for_fp8_exec(x, weight)
        _observe(args.input_quantizer, x)
        if args.is_first_microbatch in (None, True) or args.weight_workspace is None:
            _observe(args.weight_quantizer, weight)
        workspace = weight.detach().clone() if args.cache_weight and args.weight_workspace is None else None
    out = _parallel_product(args, x, weight, bias)
    if args.fp8 and is_grad_enabled:
        out = _Observed.apply(out, args.grad_output_quantizer)  # type: ignore[no-untyped-call]
    return out, workspace


@contextmanager
def bookkeeping() -> Iterator[None]:
    """`computable`, but the whole of te.pytorch.Linear.forward runs, its state, checks and caches, up to the autograd
    function around its kernels."""
    from transformer_engine.pytorch import quantization
    from transformer_engine.pytorch.module import base, linear

    from megaeva.parallel import platform

    real = linear.Linear.forward
    with computable(), ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear.Linear, "forward", real))
        stack.enter_context(mock.patch.object(linear, "_linear_eager", _product))
        view = platform._torch_on_cpu()
        capturing = mock.Mock(return_value=False)
        stack.enter_context(mock.patch.object(view.cuda, "is_current_stream_capturing", capturing))
        stack.enter_context(mock.patch.object(quantization, "torch", view))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True, create=True))
        for name in ("nvtx_range_push", "nvtx_range_pop"):
            stack.enter_context(mock.patch.object(base, name))
        stack.enter_context(mock.patch.dict("os.environ", {"NVTE_UNFUSED_FP8_UPDATE": "1"}))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
