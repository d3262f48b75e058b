"""Two towers and a temperature."""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section, LogitScaleSection, ModelSection
from megaeva.data.batch import Batch
from megaeva.model.attributes import mark_rest_replicated
from megaeva.model.layer_specs import LayerSpec, Precision
from megaeva.model.staged import forward_staged
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import Grid


class LogitScale(MegatronModule):
    """The inverse temperature's logarithm `log_scale`, and the logits' `logit_bias` or None; replicated everywhere.

    Both are 0-dim fp32 parameters.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, cfg: LogitScaleSection, *, device: torch.device | str = "cpu") -> None:
        """Builds them at cfg.init and cfg.bias; without gradient where cfg.trainable is false."""
        # mcore's DDP and optimizer ask every module for a config; the sizes mean nothing here.
        super().__init__(TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, cuda_graph_scope=[]))
        self.cfg = cfg
        self.log_scale = nn.Parameter(torch.full((), cfg.init, device=device), requires_grad=cfg.trainable)
        bias = None if cfg.bias is None else torch.full((), cfg.bias, device=device)
        self.logit_bias = None if bias is None else nn.Parameter(bias, requires_grad=cfg.trainable)
        mark_rest_replicated(self)

    def forward(self) -> Tensor:
        """Returns the 0-dim fp32 log scale; logits are exp of it times the cosine, plus the bias where there is one."""
        return self.log_scale

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamps the scale's log to [0, cfg.max] after each optimizer step. Source: EVA-CLIP training/train.py."""
        self.log_scale.clamp_(0.0, self.cfg.max)


class CLIPModel(nn.Module):
    """The towers of a contrastive run, each on its own grid."""

    def __init__(self, vision: VisionTower, text: TextTower, scale: LogitScale) -> None:
        """Holds the three; they stay usable apart."""
        super().__init__()
        self.vision, self.text, self.scale = vision, text, scale

    def train(self, mode: bool = True) -> "CLIPModel":
        """Returns itself; a tower without a trained parameter stays in evaluation mode: no drop path, no FP8."""
        super().train(mode)
        for tower in (self.vision, self.text):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Returns image_BE, not normalised, on every rank that holds a part of the tower; all of them call it.

        With pipeline stages no gradient is kept.
        """
        if self.vision.grid.pp_size == 1:
            image_BE: Tensor = self.vision(image_BCHW)
            return image_BE
        embed_dim = self.vision.embed_dim
        assert embed_dim is not None
        rows_BE = forward_staged(
            "vision",
            self.vision,
            self.vision,
            Batch.of_images(image_BCHW),
            lambda part, hidden, chunk: self.vision(part.image_BCHW, hidden=hidden, chunk=chunk),
            embed_dim,
        )
        return rows_BE[: len(image_BCHW)]

    def encode_text(self, token_BL: Tensor) -> Tensor:
        """Returns text_BE, not normalised."""
        text_BE: Tensor = self.text(token_BL)
        return text_BE


def build_clip(
    cfg: ModelSection,
    *,
    vision_grid: Grid,
    text_grid: Grid,
    precision: Precision = "fp32",
    layer_spec: LayerSpec = "local",
    device: torch.device | str = "cpu",
    fp8: Fp8Section | None = None,
) -> CLIPModel:
    """Returns the model with uninitialised tower weights (`init_weights` or a checkpoint fills them).

    All ranks must call it. The logit scale is fp32 whatever the precision.
    """
    shared: dict[str, Any] = {"precision": precision, "layer_spec": layer_spec, "device": device, "fp8": fp8}
    vision = VisionTower(cfg.vision, cfg.embed_dim, grid=vision_grid, **shared)
    text = TextTower(cfg.text, cfg.embed_dim, grid=text_grid, **shared)
    return CLIPModel(vision, text, LogitScale(cfg.logit_scale, device=device))
