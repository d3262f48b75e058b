"""The vision tower: every EVA, OpenAI, OpenCLIP and DFN image encoder of VARIANTS."""

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megaeva.config.schema import VisionSection
from megaeva.model.attributes import mark_rest_replicated
from megaeva.model.layer_specs import LayerSpec, Precision, block_spec, parts, tower_config
from megaeva.model.patch_embed import PatchEmbed
from megaeva.model.rope2d import angle_table, gather_angles
from megaeva.parallel.grid import Grid


class VisionTower(MegatronModule):
    """Image encoder; its parameters are uninitialised until `init_weights` or a checkpoint fills them.

    Parameters: patch_embed.{weight,bias}, cls_token [1, 1, D], pos_embed [1, N+1, D], ln_pre.*, blocks.layers.i.*,
    norm.*, head.{weight,bias}. Blocks are cut over tp, everything else is whole on every rank.
    """

    def __init__(
        self,
        cfg: VisionSection,
        embed_dim: int | None,
        *,
        grid: Grid,
        precision: Precision = "fp32",
        layer_spec: LayerSpec = "local",
        device: torch.device | str = "cpu",
    ) -> None:
        """Builds the tower on `device`; all ranks of `grid` must.

        Args:
            embed_dim: width of the joint embedding; None: no head.
        """
        config = tower_config(cfg, grid, precision, layer_spec)
        super().__init__(config)
        self.cfg = cfg
        self.model_type = ModelType.encoder_or_decoder
        dtype = config.params_dtype
        norm = parts(layer_spec).norm
        sizes = {"config": config, "hidden_size": cfg.hidden_size, "eps": cfg.norm_epsilon}
        with torch.device(device):
            self.patch_embed = PatchEmbed(cfg.patch_size, cfg.hidden_size, cfg.patch_bias, dtype)
            self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.hidden_size, dtype=dtype))
            self.pos_embed = nn.Parameter(torch.empty(1, cfg.num_patches + 1, cfg.hidden_size, dtype=dtype))
            self.ln_pre = norm(**sizes) if cfg.ln_pre else None
            self.blocks = TransformerBlock(
                config, block_spec(cfg, grid, layer_spec), post_layer_norm=False, pg_collection=grid.groups
            )
            self.norm = norm(**sizes)
            self.head = None if embed_dim is None else nn.Linear(cfg.hidden_size, embed_dim, cfg.head_bias, dtype=dtype)
        table = None
        if cfg.rope:
            table = angle_table(cfg.grid_size, cfg.rope_pretrain_grid, config.kv_channels).to(device)
        self.register_buffer("rope_table", table, persistent=False)
        self.rope_table: Tensor | None
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Takes the previous stage's output, as mcore's schedules ask; without a pipeline there is none."""

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Returns patch embeddings [N, B, D], positions not added yet."""
        out: Tensor = self.patch_embed(image_BCHW)
        return out

    def encode(self, patch_NBD: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Returns the last block's output [S, B, D], final norm not applied, cls first.

        Args:
            patch_NBD: of `embed`, perhaps masked.
            keep_BK: indices of the patches to keep, after positions were added; None: all.
        """
        hidden = patch_NBD + self.pos_embed[0, 1:, None]
        if keep_BK is not None:
            batch = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden[keep_BK.t(), batch]
        cls_token = (self.cls_token[0] + self.pos_embed[0, :1]).expand(hidden.shape[1], -1)
        hidden = torch.cat([cls_token[None], hidden])
        if self.ln_pre is not None:
            hidden = self.ln_pre(hidden)
        angles = None if self.rope_table is None else gather_angles(self.rope_table, keep_BK)
        out: Tensor = self.blocks(hidden, attention_mask=None, rotary_pos_emb=angles)
        return out

    def tokens(
        self,
        image_BCHW: Tensor,
        *,
        keep_BK: Tensor | None = None,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Returns all tokens after the final norm, [B, S, D], cls first.

        Args:
            mask_BN: True where `mask_token` [1, 1, D] replaces the patch embedding, before positions are added.
        """
        patches = self.embed(image_BCHW)
        if mask_BN is not None:
            assert mask_token is not None
            patches = torch.where(mask_BN.t().unsqueeze(-1), mask_token.to(patches.dtype), patches)
        normed: Tensor = self.norm(self.encode(patches, keep_BK))
        return normed.transpose(0, 1)

    def project(self, x: Tensor) -> Tensor:
        """Returns the head applied to the last dim: D -> E."""
        assert self.head is not None, "this tower was built with embed_dim=None"
        return F.linear(x, self.head.weight, self.head.bias)

    def forward(self, image_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Returns image_BE, the unnormalised embedding of cls, in the tower's dtype, alike on all tp ranks."""
        # The norm acts on each token alone, so only cls needs it.
        return self.project(self.norm(self.encode(self.embed(image_BCHW), keep_BK)[0]))
