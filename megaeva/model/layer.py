"""Transformer layers: Megatron-core's, with the two places a norm can stand and drop path."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class PreNormLayer(TransformerLayer):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)).

    A TransformerLayer, so that TransformerBlock, recomputation and pipeline schedules take it, with a forward of its
    own: mcore's has dropout, inference and offloading paths that ViTs do not use, and no place for drop path.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        # mcore hands groups only to MLP classes it knows and warns of others: build ours after it.
        bare = replace(submodules, mlp=IdentityOp)
        super().__init__(config, bare, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
        # Stochastic depth grows linearly from 0 at the first layer to `drop_path` at the last.
        self.drop_rate = drop_path * (self.layer_number - 1) / max(1, config.num_layers - 1)

    def _drop_path(self, branch_SBD: Tensor) -> Tensor:
        if self.drop_rate == 0.0 or not self.training:
            return branch_SBD
        keep = 1.0 - self.drop_rate
        # Drawn from the default generator, which seed_pass sets alike on all tp ranks: all drop the same samples.
        kept_1B1 = torch.empty(1, branch_SBD.shape[1], 1, dtype=branch_SBD.dtype, device=branch_SBD.device)
        return branch_SBD * kept_1B1.bernoulli_(keep).div_(keep)

    def forward(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Returns (hidden [S, B, D], None); mcore's block passes many arguments by name that are None here."""
        x = hidden_states
        x = x + self._drop_path(self.self_attention(self.input_layernorm(x), rotary_pos_emb))
        x = x + self._drop_path(self.mlp(self.pre_mlp_layernorm(x)))
        return x, None


class PostNormLayer(PreNormLayer):
    """x = x + norm(attention(x)); x = x + norm(mlp(x)): EVA's res-post-norm (E/14, 18B), which mcore has no slot for.

    The norms are named post_attention_layernorm and post_mlp_layernorm.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        bare = replace(submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
        super().__init__(config, bare, *args, **kwargs)
        size = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_attention_layernorm = build_module(submodules.input_layernorm, **size)
        self.post_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **size)

    def forward(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Returns (hidden [S, B, D], None)."""
        x = hidden_states
        x = x + self._drop_path(self.post_attention_layernorm(self.self_attention(x, rotary_pos_emb)))
        x = x + self._drop_path(self.post_mlp_layernorm(self.mlp(x)))
        return x, None
