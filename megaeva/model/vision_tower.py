"""The vision tower: every EVA, OpenAI, OpenCLIP and DFN image encoder of VARIANTS."""

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section, VisionSection
from megaeva.model.attributes import mark_rest_replicated
from megaeva.model.blocks import Blocks
from megaeva.model.layer_specs import LayerSpec, Precision, final_norm, parts, tower_config
from megaeva.model.patch_embed import PatchEmbed
from megaeva.model.rope2d import angle_table, gather_angles
from megaeva.model.sequence import first_token, gather_tokens, padded_length, scatter_tokens
from megaeva.parallel.grid import Grid


class VisionTower(MegatronModule):
    """Image encoder; its parameters are uninitialised until `init_weights` or a checkpoint fills them.

    Parameters: patch_embed.{weight,bias}, cls_token [1, 1, D], pos_embed [1, N+1, D], ln_pre.* on the first pipeline
    stage; blocks.layers.i.* on the stage that runs layer i of the whole tower; norm.*, head.{weight,bias} on the last.
    Blocks are cut over tp, everything else is whole on every rank of its stage.
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
        fp8: Fp8Section | None = None,
    ) -> None:
        """Builds the tower on `device`; all ranks of `grid` must.

        Args:
            embed_dim: width of the joint embedding; None: no head.
            fp8: of the linears of the layers, on top of precision="bf16"; None: none.
        """
        config = tower_config(cfg, grid, precision, layer_spec)
        super().__init__(config)
        self.cfg, self.grid, self.embed_dim = cfg, grid, embed_dim
        self.model_type = ModelType.encoder_or_decoder
        dtype = config.params_dtype
        width = cfg.hidden_size
        with torch.device(device):
            if grid.is_first_stage:
                self.patch_embed = PatchEmbed(cfg.patch_size, width, cfg.patch_bias, dtype)
                self.cls_token = nn.Parameter(torch.empty(1, 1, width, dtype=dtype))
                self.pos_embed = nn.Parameter(torch.empty(1, cfg.num_patches + 1, width, dtype=dtype))
                norm = parts(layer_spec).norm
                self.ln_pre = norm(config=config, hidden_size=width, eps=cfg.norm_epsilon) if cfg.ln_pre else None
            self.blocks = Blocks(config, cfg, grid, layer_spec, fp8)
            if grid.is_last_stage:
                self.norm = final_norm(config, layer_spec)
                self.head = None if embed_dim is None else nn.Linear(width, embed_dim, cfg.head_bias, dtype=dtype)
        table = None
        if cfg.rope:
            table = angle_table(cfg.grid_size, cfg.rope_pretrain_grid, config.kv_channels).to(device)
        self.register_buffer("rope_table", table, persistent=False)
        self.rope_table: Tensor | None
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Does nothing: mcore's schedules ask for it, but hidden states are arguments of `forward` here."""

    def num_tokens(self, keep_BK: Tensor | None) -> int:
        """Returns the length of the sequence: cls and the patches that are kept, all of them for None."""
        return 1 + (self.cfg.num_patches if keep_BK is None else keep_BK.shape[1])

    def num_stage_tokens(self, keep_BK: Tensor | None) -> int:
        """Returns the length that mcore's pipeline schedules must be told, before the sequence is cut over tp.

        It is `num_tokens`, under sequence parallelism rounded up to a multiple of tp.
        """
        return padded_length(self.num_tokens(keep_BK), self.grid)

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Returns patch embeddings [N, B, D], positions not added yet."""
        out: Tensor = self.patch_embed(image_BCHW)
        return out

    def start(self, patch_NBD: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Returns the first layer's input [S', B, D], cls first; S' is num_stage_tokens, cut over tp where it is.

        Args:
            patch_NBD: of `embed`, perhaps masked.
            keep_BK: indices of the patches to keep, after positions were added; None: all.
        """
        hidden = patch_NBD + self.pos_embed[0, 1:, None]
        if keep_BK is not None:
            batch = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden[keep_BK.t(), batch]
        cls_token = (self.cls_token[0] + self.pos_embed[0, :1]).expand(hidden.shape[1], -1)
        hidden = scatter_tokens(torch.cat([cls_token[None], hidden]), self.grid)
        return hidden if self.ln_pre is None else self.ln_pre(hidden)

    def run_blocks(self, hidden_SBD: Tensor, keep_BK: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Returns the output of this rank's `chunk` of layers [S', B, D], final norm not applied.

        Args:
            hidden_SBD: of `start`, or of the previous virtual stage.
        """
        angles = None if self.rope_table is None else gather_angles(self.rope_table, keep_BK)
        out: Tensor = self.blocks(hidden_SBD, self.num_tokens(keep_BK), angles, chunk)
        return out

    def encode(self, patch_NBD: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Returns the last block's output [S, B, D] of a tower without stages, final norm not applied, cls first.

        Arguments are those of `start`. All tp ranks must call it, and all get every token.
        """
        assert self.blocks.num_stages == 1, "a tower with pipeline stages has `forward` only"
        out = self.run_blocks(self.start(patch_NBD, keep_BK), keep_BK)
        return gather_tokens(out, self.num_tokens(keep_BK), self.grid)

    def tokens(
        self,
        image_BCHW: Tensor,
        *,
        keep_BK: Tensor | None = None,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Returns all tokens after the final norm, [B, S, D], cls first, of a tower without stages.

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
        out: Tensor = self.head(x)
        return out

    def forward(
        self,
        image_BCHW: Tensor | None,
        keep_BK: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """Returns image_BE, the unnormalised embedding of cls, in the tower's dtype, alike on all tp ranks.

        With pipeline stages that is what the last virtual stage returns; the others return the hidden states
        [num_stage_tokens, B, D] for the next one, under sequence parallelism this rank's part of them. All tp ranks of
        the stage must call it.

        Args:
            image_BCHW: read by the first virtual stage only.
            keep_BK: indices of the patches to keep, in the order they stand in the sequence; None: all. Every stage
                needs them.
            hidden: what the previous virtual stage returned; ignored by the first.
            chunk: which of this rank's virtual stages runs.
        """
        if self.blocks.is_first(chunk):
            assert image_BCHW is not None
            hidden = self.start(self.embed(image_BCHW), keep_BK)
        assert hidden is not None, "a later stage needs the previous one's hidden states"
        hidden = self.run_blocks(hidden, keep_BK, chunk)
        if not self.blocks.is_last(chunk):
            return hidden
        # The norm acts on each token alone, so only cls needs it.
        return self.project(self.norm(first_token(hidden, self.grid)))
