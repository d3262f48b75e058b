"""The vision tower in masked feature distillation."""

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megaeva.config.schema import VisionSection
from megaeva.model.attributes import mark_rest_replicated
from megaeva.model.layer_specs import LayerSpec, Precision
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import Grid


class MIMStudent(MegatronModule):
    """A tower without head that predicts a teacher's features at masked patches.

    Parameters: vision.*, mask_token [1, 1, D], lm_head.{weight,bias}; the last two are dropped after distillation.
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
    ) -> None:
        """Builds the student on `device`; all ranks of `grid` must.

        Args:
            teacher_dim: width of the teacher's joint embedding, the target.
            stop_grad_patch_embed: share of the gradient that reaches the patch embedding (EVA-02: 0.1).
        """
        vision = VisionTower(cfg, embed_dim=None, grid=grid, precision=precision, layer_spec=layer_spec, device=device)
        super().__init__(vision.config)
        self.model_type = ModelType.encoder_or_decoder
        self.stop_grad_patch_embed = stop_grad_patch_embed
        self.vision = vision
        dtype = vision.config.params_dtype
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.hidden_size, dtype=dtype, device=device))
        self.lm_head = nn.Linear(cfg.hidden_size, teacher_dim, dtype=dtype, device=device)
        mark_rest_replicated(self)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Takes the previous stage's output, as mcore's schedules ask; without a pipeline there is none."""

    def forward(self, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
        """Returns predicted_ME, one row for each True of mask_BN in row-major order (sample by sample)."""
        patches = self.vision.embed(image_BCHW)
        share = self.stop_grad_patch_embed
        if share < 1.0:
            patches = patches.detach() * (1.0 - share) + patches * share
        patches = torch.where(mask_BN.t().unsqueeze(-1), self.mask_token, patches)
        hidden_BND = self.vision.encode(patches)[1:].transpose(0, 1)
        # Only masked tokens are compared, so only they are normalised and projected.
        predicted_ME: Tensor = self.lm_head(self.vision.norm(hidden_BND[mask_BN]))
        return predicted_ME
