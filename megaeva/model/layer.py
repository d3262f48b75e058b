"""Transformer layers: Megatron-core's, with the two places a norm can stand and drop path."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """What layers know of one forward pass besides the hidden states.

    mcore's TransformerBlock hands it to every layer as `packed_seq_params`, from a closure where it recomputes: a layer
    that runs again in the backward pass gets the same object, whatever has been seeded since.

    Attributes:
        num_tokens: of the whole sequence, without the padding of sequence parallelism.
        seed: torch.initial_seed() at the time of the pass; what is drawn follows from it and from the place of the draw
            alone, so it is the same for every tp, sequence parallelism, pp, vpp and recompute, and moves no generator.
            The microbatch is part of the seed, see `seed_pass`.
    """

    num_tokens: int
    seed: int

    def generator(self, device: torch.device, *place: int) -> torch.Generator:
        """Returns the generator on `device` of what is drawn at `place` (layer number, branch) in this pass."""
        key = f"{self.seed}/{place}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


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
        number: int = 0,
    ) -> None:
        """As TransformerLayer; `number` is the layer's in the whole tower, from 0, where mcore's counts in a chunk."""
        # mcore hands groups only to MLP classes it knows and warns of others: build ours after it.
        bare = replace(submodules, mlp=IdentityOp)
        super().__init__(config, bare, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.layer_number = number + 1
        self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
        # Stochastic depth grows linearly from 0 at the first layer to `drop_path` at the last.
        self.drop_rate = drop_path * number / max(1, config.num_layers - 1)

    def _drop_path(self, branch_SBD: Tensor, this_pass: Pass, branch: int) -> Tensor:
        if self.drop_rate == 0.0 or not self.training:
            return branch_SBD
        keep = 1.0 - self.drop_rate
        generator = this_pass.generator(branch_SBD.device, self.layer_number, branch)
        kept_1B1 = torch.empty(1, branch_SBD.shape[1], 1, dtype=branch_SBD.dtype, device=branch_SBD.device)
        return branch_SBD * kept_1B1.bernoulli_(keep, generator=generator).div_(keep)

    def forward(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, *, packed_seq_params: Pass, **unused: Any
    ) -> tuple[Tensor, None]:
        """Returns (hidden [S, B, D], None); mcore's block passes many arguments by name that are None here."""
        x, run = hidden_states, packed_seq_params
        x = x + self._drop_path(self.self_attention(self.input_layernorm(x), run.num_tokens, rotary_pos_emb), run, 0)
        x = x + self._drop_path(self.mlp(self.pre_mlp_layernorm(x)), run, 1)
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
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, *, packed_seq_params: Pass, **unused: Any
    ) -> tuple[Tensor, None]:
        """Returns (hidden [S, B, D], None)."""
        x, run = hidden_states, packed_seq_params
        attended = self.self_attention(x, run.num_tokens, rotary_pos_emb)
        x = x + self._drop_path(self.post_attention_layernorm(attended), run, 0)
        x = x + self._drop_path(self.post_mlp_layernorm(self.mlp(x)), run, 1)
        return x, None
