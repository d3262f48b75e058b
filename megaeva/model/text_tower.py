"""The causal text tower that all variants share but for size and activation."""

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section, TextSection
from megaeva.model.attributes import mark_rest_replicated, mark_sharded
from megaeva.model.blocks import Blocks
from megaeva.model.layer_specs import LayerSpec, Precision, final_norm, tower_config
from megaeva.model.linear import no_init
from megaeva.model.sequence import gather_tokens, scatter_tokens
from megaeva.parallel.grid import Grid


class TextTower(MegatronModule):
    """Caption encoder; its parameters are uninitialised until `init_weights` or a checkpoint fills them.

    Parameters: token_embedding.weight [vocabulary, D] (cut over tp where tp divides the vocabulary, else whole on each
    rank), pos_embed [L, D], blocks.layers.i.*, norm.*, head.weight [E, D].
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
        fp8: Fp8Section | None = None,
    ) -> None:
        """Builds the tower on `device`; all ranks of `grid` must. It has no pipeline stages."""
        assert grid.pp_size == 1
        config = tower_config(cfg, grid, precision, layer_spec)
        super().__init__(config)
        self.cfg, self.grid = cfg, grid
        self.model_type = ModelType.encoder_or_decoder
        dtype = config.params_dtype
        with torch.device(device):
            self.token_embedding: nn.Embedding | VocabParallelEmbedding
            if cfg.vocab_size % grid.tp_size:
                # mcore cuts into equal parts only, and 5 divides 20 heads but not CLIP's 49,408 words.
                # Every rank sees every token before `scatter_tokens`, so its gradient is whole too.
                weight = torch.empty(cfg.vocab_size, cfg.hidden_size, dtype=dtype)
                self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size, _weight=weight)
            else:
                self.token_embedding = VocabParallelEmbedding(
                    cfg.vocab_size, cfg.hidden_size, init_method=no_init, config=config, tp_group=grid.groups.tp
                )
                mark_sharded(self.token_embedding.weight, 0)
            self.pos_embed = nn.Parameter(torch.empty(cfg.context_length, cfg.hidden_size, dtype=dtype))
            self.blocks = Blocks(config, cfg, grid, layer_spec, fp8)
            self.norm = final_norm(config, layer_spec)
            self.head = nn.Linear(cfg.hidden_size, embed_dim, bias=False, dtype=dtype)
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Does nothing: mcore's schedules ask for it, and there are no stages."""

    def forward(self, token_BL: Tensor) -> Tensor:
        """Returns text_BE, the unnormalised embedding of each caption's end token, in the tower's dtype.

        All tp ranks must call it; all get the same.

        Args:
            token_BL: ids padded with 0; the end token has the largest id of all. On the CPU, where captions come from,
                their length costs no synchronisation with the device.
        """
        end_B = token_BL.argmax(-1)
        # Causal: no token sees what comes after it, so those after the batch's last end token are not computed.
        num_tokens, device = int(end_B.max()) + 1, self.pos_embed.device
        own_BL, end_B = token_BL[:, :num_tokens].to(device, non_blocking=True), end_B.to(device, non_blocking=True)
        return self.encode(own_BL, end_B, num_tokens)

    def encode(self, token_BL: Tensor, end_B: Tensor, num_tokens: int) -> Tensor:
        """Returns text_BE, the embedding of each caption's token `end_B`, of which the first `num_tokens` are computed.

        `forward` computes up to the batch's last end token, which changes nothing but the work.
        """
        hidden_BLD = self.token_embedding(token_BL[:, :num_tokens]) + self.pos_embed[:num_tokens]
        hidden_LBD = scatter_tokens(hidden_BLD.transpose(0, 1).contiguous(), self.grid)
        hidden_LBD = gather_tokens(self.blocks(hidden_LBD, num_tokens), num_tokens, self.grid)
        end_BD = hidden_LBD[end_B, torch.arange(end_B.shape[0], device=end_B.device)]
        text_BE: Tensor = self.head(self.norm(end_BD))
        return text_BE
