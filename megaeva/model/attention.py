"""Multi-head self-attention of both towers: what mcore's SelfAttention cannot say."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaeva.model.attributes import mark_sharded
from megaeva.model.linear import no_init
from megaeva.model.norm import build_inner_norm
from megaeva.ops.attention import attention


@dataclass
class SelfAttentionSubmodules:
    """Parts of `SelfAttention`.

    Attributes:
        inner_norm: sub-LN between attention output and projection; None: none.
    """

    linear_qkv: type | ModuleSpec
    core_attention: type | ModuleSpec
    linear_proj: type | ModuleSpec
    inner_norm: type | ModuleSpec | None = None


class CoreAttention(nn.Module):
    """`ops.attention`; mcore's DotProductAttention has no CPU path and materialises the scores."""

    def __init__(
        self, causal: bool, num_heads: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        """`num_heads` on this rank; the rest is for what stands in its place."""
        super().__init__()
        self.causal, self.num_heads = causal, num_heads

    def forward(self, qkv_SBX: Tensor, rotary_cos_sin: Tensor | None) -> Tensor:
        """Returns softmax(q k^T / sqrt(K)) v of all heads, [S, B, A K], in the input's dtype."""
        return attention(qkv_SBX, self.num_heads, cos_sin=rotary_cos_sin, causal=self.causal)


class SelfAttention(MegatronModule):
    """Self-attention with heads cut over tp.

    Differs from mcore's: the bias of q, k, v is chosen apart from the other biases (none; q and v only, as own
    parameters; all), a norm may stand before the projection, and rotary angles are given per token.
    The rows of `linear_qkv.weight` are [q, k, v] of head 0, then of head 1, ... as in mcore.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        qkv_bias: Literal["none", "qv", "qkv"],
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        tp_size = 1 if pg_collection.tp is None else pg_collection.tp.size()
        self.num_heads = config.num_attention_heads // tp_size  # on this rank
        self.head_width = config.kv_channels
        width = config.num_attention_heads * config.kv_channels
        shared = {"config": config, "init_method": no_init, "tp_group": pg_collection.tp}
        self.linear_qkv = build_module(
            submodules.linear_qkv, config.hidden_size, 3 * width, bias=qkv_bias == "qkv", **shared
        )
        self.has_qv_bias = qkv_bias == "qv"
        if self.has_qv_bias:
            self.q_bias = nn.Parameter(torch.empty(width // tp_size, dtype=config.params_dtype))
            self.v_bias = nn.Parameter(torch.empty(width // tp_size, dtype=config.params_dtype))
            mark_sharded(self.q_bias, 0)
            mark_sharded(self.v_bias, 0)
        self.core_attention = build_module(
            submodules.core_attention, num_heads=self.num_heads, config=config, pg_collection=pg_collection
        )
        self.inner_norm = build_inner_norm(submodules.inner_norm, config, width, pg_collection)
        self.linear_proj = build_module(submodules.linear_proj, width, config.hidden_size, bias=True, **shared)

    def _qkv_bias(self) -> Tensor | None:
        if not self.has_qv_bias:
            return None
        q_AK = self.q_bias.view(self.num_heads, self.head_width)
        v_AK = self.v_bias.view(self.num_heads, self.head_width)
        return torch.stack([q_AK, torch.zeros_like(q_AK), v_AK], 1).flatten()

    def forward(self, hidden_SBD: Tensor, num_tokens: int, rotary_cos_sin: Tensor | None = None) -> Tensor:
        """Returns the projected attention output, of the shape of `hidden_SBD`; all tp ranks must call it.

        It is the same on all tp ranks, or under sequence parallelism that of this rank's tokens.

        Args:
            num_tokens: of the whole sequence, padding not counted.
            rotary_cos_sin: of `rope2d.gather_angles`, None without RoPE.
        """
        qkv = self.linear_qkv(hidden_SBD, self._qkv_bias())
        # The linear has gathered the sequence. Without its padding no mask is needed, which flash kernels do not take.
        padding = len(qkv) - num_tokens
        if padding:
            qkv = qkv[:num_tokens]
        if self.config.recompute_granularity == "selective" and self.training:
            out = checkpoint(self.core_attention, False, qkv, rotary_cos_sin)
        else:
            out = self.core_attention(qkv, rotary_cos_sin)
        if self.inner_norm is not None:
            out = self.inner_norm(out)
        if padding:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        projected: Tensor = self.linear_proj(out)
        return projected
