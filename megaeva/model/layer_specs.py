"""From a recipe's tower section to Megatron-core's config and specs, on plain PyTorch or on Transformer Engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megaeva.config.fp8 import Fp8Linear, in_fp8
from megaeva.config.schema import Fp8Section, TextSection, VisionSection
from megaeva.model.attention import CoreAttention, SelfAttention, SelfAttentionSubmodules
from megaeva.model.layer import PostNormLayer, PreNormLayer
from megaeva.model.linear import ColumnLinear, RowLinear
from megaeva.model.mlp import MLP, MLPSubmodules
from megaeva.model.norm import Norm, ShardedNorm
from megaeva.parallel.grid import Grid
from megaeva.parallel.platform import DTYPES, require_transformer_engine

Precision = Literal["fp32", "bf16", "fp16"]
LayerSpec = Literal["local", "te"]


@dataclass(frozen=True)
class Parts:
    """Linears, norm and attention of a layer spec."""

    column: type
    row: type
    norm: type
    attention: type


def parts(layer_spec: LayerSpec) -> Parts:
    """Returns plain PyTorch parts ("local") or Transformer Engine's ("te", CUDA only); parameters are alike.

    Raises:
        UserError: "te" without a working Transformer Engine.
    """
    if layer_spec == "local":
        return Parts(ColumnLinear, RowLinear, Norm, CoreAttention)
    require_transformer_engine()
    from megaeva.model import transformer_engine as te

    return Parts(te.TransformerEngineColumn, te.TransformerEngineRow, te.TENorm, te.TransformerEngineAttention)


def tower_config(
    section: VisionSection | TextSection, grid: Grid, precision: Precision, layer_spec: LayerSpec
) -> TransformerConfig:
    """Returns Megatron-core's config of a tower: sizes, parallel axes, dtype; all dropout and fusion off."""
    dtype = DTYPES[precision]
    norm = section.norm if isinstance(section, VisionSection) else "layernorm"
    gated = section.activation == "swiglu"
    return TransformerConfig(
        num_layers=section.num_layers,
        hidden_size=section.hidden_size,
        num_attention_heads=section.num_heads,
        ffn_hidden_size=section.ffn_hidden_size,
        kv_channels=section.hidden_size // section.num_heads,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[norm],
        layernorm_epsilon=section.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=False,
        tensor_model_parallel_size=grid.tp_size,
        sequence_parallel=grid.sequence_parallel,
        tp_comm_overlap=_overlaps(grid, layer_spec),
        # Whatever grid.pp_size is: `Blocks` cuts the stages. mcore's own arithmetic knows no uneven virtual stages and
        # asks parallel_state, which does not exist here.
        pipeline_model_parallel_size=1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        cuda_graph_scope=[],  # the default's deprecated spelling warns in every process
        # "CPU initialisation" only leaves the device to torch.device(...) around the constructor; init.py sets weights.
        use_cpu_initialization=layer_spec == "local",
        perform_initialization=False,
    )


def _overlaps(grid: Grid, layer_spec: LayerSpec) -> bool:
    """Whether the tower's linears overlap tp transfers: asked for, and the buffers are there, as in a training run."""
    if not grid.axes.tp_comm_overlap or layer_spec == "local":
        return False
    from megaeva.model.transformer_engine import overlap_started

    return overlap_started()


def final_norm(config: TransformerConfig, layer_spec: LayerSpec) -> Any:
    """Returns a tower's last norm. It acts on gathered tokens, so it is not marked sequence_parallel."""
    config = replace(config, sequence_parallel=False)
    return parts(layer_spec).norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def block_spec(
    section: VisionSection | TextSection,
    layer_spec: LayerSpec,
    numbers: Sequence[int],
    tp_size: int = 1,
    fp8: Fp8Section | None = None,
) -> TransformerBlockSubmodules:
    """Returns the layers with these numbers (from 0 in the whole tower), no final norm: the towers have their own.

    Raises:
        UserError: "te" without a working Transformer Engine, or with `fp8` that this GPU cannot.
    """
    if fp8 is not None and layer_spec == "te":
        require_transformer_engine()
        from megaeva.model.transformer_engine import check_chip

        check_chip(fp8)
    layers = [_layer_spec(section, parts(layer_spec), number, tp_size, fp8) for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers)


def _layer_spec(
    section: VisionSection | TextSection, part: Parts, number: int, tp_size: int, fp8: Fp8Section | None
) -> ModuleSpec:
    vision = section if isinstance(section, VisionSection) else None

    def linear(kind: type, name: Fp8Linear) -> ModuleSpec:
        params: dict[str, Any] = {"tp_comm_buffer_name": name}
        if fp8 is not None and in_fp8(section, tp_size, fp8, number, name):
            params["fp8"] = fp8
        return ModuleSpec(module=kind, params=params)

    attention = ModuleSpec(
        module=SelfAttention,
        params={"qkv_bias": vision.qkv_bias if vision else "qkv"},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear(part.column, "qkv"),
            core_attention=ModuleSpec(module=part.attention, params={"causal": vision is None}),
            linear_proj=linear(part.row, "proj"),
            inner_norm=ShardedNorm if vision and vision.sub_ln_attention else None,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        params={"activation": section.activation},
        submodules=MLPSubmodules(
            linear_fc1=linear(part.column, "fc1"),
            linear_fc2=linear(part.row, "fc2"),
            inner_norm=ShardedNorm if vision and vision.sub_ln_mlp else None,
        ),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=part.norm,
        self_attention=attention,
        pre_mlp_layernorm=part.norm,
        mlp=mlp,
        cross_attention=IdentityOp,
    )
    return ModuleSpec(
        module=PostNormLayer if vision and vision.norm_position == "post" else PreNormLayer,
        params={"drop_path": vision.drop_path if vision else 0.0, "number": number},
        submodules=submodules,
    )
