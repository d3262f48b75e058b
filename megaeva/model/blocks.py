"""The transformer layers that one rank holds of a tower."""

from typing import Any, Self

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section, TextSection, VisionSection
from megaeva.config.topology import virtual_stages
from megaeva.model.layer import Pass
from megaeva.model.layer_specs import LayerSpec, block_spec
from megaeva.parallel.grid import Grid

_LAYERS_RNG = "model-parallel-rng"


class Blocks(MegatronModule):
    """This rank's layers: one mcore TransformerBlock for each of its chunks (virtual pipeline stages).

    Parameters: layers.N.*, with N the layer's number (from 0) in the whole tower, whichever stage holds it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        section: VisionSection | TextSection,
        grid: Grid,
        layer_spec: LayerSpec,
        fp8: Fp8Section | None = None,
    ) -> None:
        super().__init__(config)
        if (grid.sequence_parallel or layer_spec == "te") and _LAYERS_RNG not in get_cuda_rng_tracker().get_states():
            # mcore's block switches to this generator state around its layers, and Transformer Engine's linears do
            # while they are built; both fail where nobody has made it, as in evaluation, which seeds nothing. No layer
            # here draws from it: see `Pass.seed`.
            get_cuda_rng_tracker().add(_LAYERS_RNG, torch.initial_seed())
        stages = virtual_stages(grid.axes, section.num_layers)
        self.num_stages = len(stages)
        self._pp_size, self._pp_rank = grid.pp_size, grid.pp_rank
        self.layers = nn.ModuleDict()
        # In a list, which registers nothing: their own names count layers from 0 in each chunk.
        self._chunks: list[TransformerBlock] = []
        for numbers in stages[grid.pp_rank :: grid.pp_size]:
            spec = block_spec(section, layer_spec, numbers, grid.tp_size, fp8)
            chunk = TransformerBlock(config, spec, post_layer_norm=False, pg_collection=grid.groups)
            self._chunks.append(chunk)
            self.layers.update({str(number): layer for number, layer in zip(numbers, chunk.layers, strict=True)})

    def is_first(self, chunk: int) -> bool:
        """Whether this rank's `chunk` is the first virtual stage of the tower: it embeds."""
        return chunk == 0 and self._pp_rank == 0

    def is_last(self, chunk: int) -> bool:
        """Whether this rank's `chunk` is the last virtual stage of the tower: its output leaves it."""
        return chunk == len(self._chunks) - 1 and self._pp_rank == self._pp_size - 1

    def train(self, mode: bool = True) -> Self:
        """Returns itself in training mode or not, and the TransformerBlocks, which ask for it before they recompute."""
        super().train(mode)
        for chunk in self._chunks:
            chunk.train(mode)
        return self

    def forward(
        self, hidden_SBD: Tensor, num_tokens: int, rotary_cos_sin: Tensor | None = None, chunk: int = 0
    ) -> Tensor:
        """Returns the output of the chunk's last layer, of the shape of `hidden_SBD`; all tp ranks must call it.

        Args:
            hidden_SBD: under sequence parallelism this rank's tokens, as `scatter_tokens` cut them.
            num_tokens: of the whole sequence, padding not counted.
            rotary_cos_sin: of `rope2d.gather_angles`, None without RoPE.
        """
        this_pass: Any = Pass(num_tokens, torch.initial_seed())
        out: Tensor = self._chunks[chunk](
            hidden_SBD, attention_mask=None, rotary_pos_emb=rotary_cos_sin, packed_seq_params=this_pass
        )
        return out
