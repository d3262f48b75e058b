"""The causal text tower that all variants share but for size and activation."""

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megaeva.config.schema import TextSection
from megaeva.model.attributes import mark_rest_replicated, mark_sharded
from megaeva.model.layer_specs import LayerSpec, Precision, block_spec, parts, tower_config
from megaeva.model.linear import no_init
from megaeva.parallel.grid import Grid


class TextTower(MegatronModule):
    """Caption encoder; its parameters are uninitialised until `init_weights` or a checkpoint fills them.

    Parameters: token_embedding.weight [vocabulary, D] (cut over tp), pos_embed [L, D], blocks.layers.i.*, norm.*,
    head.weight [E, D].
    """

    def __init__(
        self,
        cfg: TextSection,
        embed_dim: int,
        *,
        grid: Grid,
        precision: Precision = "fp32",
        layer_spec: LayerSpec = "local",
        device: torch.device | str = "cpu",
    ) -> None:
        """Builds the tower on `device`; all ranks of `grid` must."""
        config = tower_config(cfg, grid, precision, layer_spec)
        super().__init__(config)
        self.cfg = cfg
        self.model_type = ModelType.encoder_or_decoder
        dtype = config.params_dtype
        with torch.device(device):
            self.token_embedding = VocabParallelEmbedding(
                cfg.vocab_size, cfg.hidden_size, init_method=no_init, config=config, tp_group=grid.groups.tp
            )
            mark_sharded(self.token_embedding.weight, 0)
            self.pos_embed = nn.Parameter(torch.empty(cfg.context_length, cfg.hidden_size, dtype=dtype))
            self.blocks = TransformerBlock(
                config, block_spec(cfg, grid, layer_spec), post_layer_norm=False, pg_collection=grid.groups
            )
            self.norm = parts(layer_spec).norm(config=config, hidden_size=cfg.hidden_size, eps=cfg.norm_epsilon)
            self.head = nn.Linear(cfg.hidden_size, embed_dim, bias=False, dtype=dtype)
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Takes the previous stage's output, as mcore's schedules ask; without a pipeline there is none."""

    def forward(self, token_BL: Tensor) -> Tensor:
        """Returns text_BE, the unnormalised embedding of each caption's end token, in the tower's dtype.

        Args:
            token_BL: ids padded with 0; the end token has the largest id of all.
        """
        end_B = token_BL.argmax(-1)
        # Causal: no token sees what comes after it, so those after the batch's last end token are not computed.
        length = int(end_B.max()) + 1
        hidden_BLD = self.token_embedding(token_BL[:, :length]) + self.pos_embed[:length]
        hidden_LBD = self.blocks(hidden_BLD.transpose(0, 1).contiguous(), attention_mask=None)
        end_BD = hidden_LBD[end_B, torch.arange(len(end_B), device=end_B.device)]
        text_BE: Tensor = self.head(self.norm(end_BD))
        return text_BE
