"""The vision tower in masked feature distillation."""

from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section, VisionSection
from megaeva.data.batch import Batch
from megaeva.model.attributes import mark_rest_replicated
from megaeva.model.layer_specs import LayerSpec, Precision
from megaeva.model.sequence import gather_tokens
from megaeva.model.staged import forward_staged
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import Grid


class MIMStudent(MegatronModule):
    """A tower without head that predicts a teacher's features at masked patches.

    Parameters: vision.*, mask_token [1, 1, D] on the first pipeline stage, lm_head.{weight,bias} on the last; these two
    are dropped after distillation.
    Source: VisionTransformerForMaskedImageModeling in EVA-02/asuka.
    """

    def __init__(
        self,
        cfg: VisionSection,
        teacher_dim: int,
        *,
        grid: Grid,
        precision: Precision = "fp32",
        layer_spec: LayerSpec = "local",
        device: torch.device | str = "cpu",
        stop_grad_patch_embed: float = 1.0,
        fp8: Fp8Section | None = None,
    ) -> None:
        """Builds the student on `device`; all ranks of `grid` must.

        Args:
            teacher_dim: width of the teacher's joint embedding, the target.
            stop_grad_patch_embed: share of the gradient that reaches the patch embedding (EVA-02: 0.1).
        """
        vision = VisionTower(
            cfg, embed_dim=None, grid=grid, precision=precision, layer_spec=layer_spec, device=device, fp8=fp8
        )
        super().__init__(vision.config)
        self.model_type = ModelType.encoder_or_decoder
        self.stop_grad_patch_embed = stop_grad_patch_embed
        self.vision = vision
        self.teacher_dim = teacher_dim
        dtype = vision.config.params_dtype
        if grid.is_first_stage:
            self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.hidden_size, dtype=dtype, device=device))
        if grid.is_last_stage:
            self.lm_head = nn.Linear(cfg.hidden_size, teacher_dim, dtype=dtype, device=device)
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Does nothing: mcore's schedules ask for it, but hidden states are arguments of `forward` here."""

    def forward(
        self, image_BCHW: Tensor | None, mask_BN: Tensor, *, hidden: Tensor | None = None, chunk: int = 0
    ) -> Tensor:
        """Returns predicted_ME, one row for each True of mask_BN in row-major order (sample by sample).

        With pipeline stages that is what the last virtual stage returns; the others return the hidden states for the
        next one. `image_BCHW`, `hidden` and `chunk` are as in VisionTower.forward; all tp ranks must call it.
        """
        vision = self.vision
        if vision.blocks.is_first(chunk):
            assert image_BCHW is not None
            hidden = vision.start(self._masked(vision.embed(image_BCHW), mask_BN))
        assert hidden is not None, "a later stage needs the previous one's hidden states"
        hidden = vision.run_blocks(hidden, chunk=chunk)
        if not vision.blocks.is_last(chunk):
            return hidden
        token_SBD = gather_tokens(hidden, vision.num_tokens(None), vision.grid)
        # Only masked tokens are compared, so only they are normalised and projected.
        predicted_ME: Tensor = self.lm_head(vision.norm(token_SBD[1:].transpose(0, 1)[mask_BN]))
        return predicted_ME

    @torch.no_grad()
    def predict(self, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
        """Returns predicted_ME without gradient, on every rank of the student's stages; all of them call it."""
        if self.vision.grid.pp_size == 1:
            predicted_ME: Tensor = self(image_BCHW, mask_BN)
            return predicted_ME
        return forward_staged(
            "student",
            self,
            self.vision,
            replace(Batch.of_images(image_BCHW), mask_BN=mask_BN),
            lambda part, hidden, chunk: self(part.image_BCHW, part.mask_BN, hidden=hidden, chunk=chunk),
            self.teacher_dim,
        )

    def _masked(self, patch_NBD: Tensor, mask_BN: Tensor) -> Tensor:
        share = self.stop_grad_patch_embed
        if share < 1.0:
            patch_NBD = patch_NBD.detach() * (1.0 - share) + patch_NBD * share
        return torch.where(mask_BN.t().unsqueeze(-1), self.mask_token, patch_NBD)
