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
from megaeva.model.rope2d import rotate


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
    """scaled_dot_product_attention; mcore's DotProductAttention has no CPU path and materialises the scores."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query_BASK: Tensor, key_BASK: Tensor, value_BASK: Tensor) -> Tensor:
        """Returns softmax(q k^T / sqrt(K)) v, [B, A, S, K], in the inputs' dtype."""
        dtype = query_BASK.dtype
        if dtype == torch.bfloat16 and query_BASK.device.type == "cpu":
            # bf16 attention is slow on CPU: 15.9 ms with backward at demo size (64, 6, 17, 32), with these casts 1.9.
            query_BASK, key_BASK, value_BASK = query_BASK.float(), key_BASK.float(), value_BASK.float()
        out = F.scaled_dot_product_attention(query_BASK, key_BASK, value_BASK, is_causal=self.causal)
        return out.to(dtype)


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
        self.core_attention = build_module(submodules.core_attention)
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
        batch = hidden_SBD.shape[1]
        qkv = self.linear_qkv(hidden_SBD, self._qkv_bias())
        # The linear has gathered the sequence. Without its padding no mask is needed, which flash kernels do not take.
        padding = len(qkv) - num_tokens
        if padding:
            qkv = qkv[:num_tokens]
        query, key, value = qkv.view(num_tokens, batch, self.num_heads, 3, self.head_width).unbind(3)
        if rotary_cos_sin is not None:
            query, key = rotate(query, rotary_cos_sin), rotate(key, rotary_cos_sin)
        heads_BASK = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        if self.config.recompute_granularity == "selective" and self.training:
            out_BASK = checkpoint(self.core_attention, False, *heads_BASK)
        else:
            out_BASK = self.core_attention(*heads_BASK)
        out = out_BASK.permute(2, 0, 1, 3).flatten(2)
        if self.inner_norm is not None:
            out = self.inner_norm(out)
        if padding:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        projected: Tensor = self.linear_proj(out)
        return projected
