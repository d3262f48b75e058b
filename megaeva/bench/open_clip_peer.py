"""A training step of open_clip: its model, its ClipLoss, AdamW as open_clip_train builds it, `--precision amp_bf16`."""

import math
from typing import Any

import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.rules import convert_state
from megaeva.config.schema import Config, ModelSection, OptimSection
from megaeva.data.batch import Batch
from megaeva.model.clip_model import build_clip
from megaeva.parallel.grid import grid_of_one


class OpenClipStep:
    """Calling it makes one training step on `batch`, as open_clip_train's train_one_epoch does, and returns its loss.

    Args:
        model: of `open_clip.create_model`.
    """

    def __init__(self, model: Any, cfg: Config, batch: Batch) -> None:
        import open_clip

        self.model, self.batch = model.train(), batch
        self.loss = open_clip.ClipLoss()
        self.optimizer = adamw(model, cfg.optim)
        self.autocast = cfg.train.precision == "bf16"

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(self.batch.image_BCHW.device.type, torch.bfloat16, enabled=self.autocast):
            image_BE, text_BE, scale = self.model(self.batch.image_BCHW, self.batch.token_BL)[:3]
            loss: Tensor = self.loss(image_BE, text_BE, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return loss.item()


def adamw(model: torch.nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW over open_clip's two groups; `fused` and `foreach` are left to torch, as there. Source: open_clip_train."""

    def exempt(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if exempt(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not exempt(name, p)], "weight_decay": optim.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=optim.vision.lr, betas=optim.betas, eps=optim.epsilon)


def converted_weights(model: torch.nn.Module, cfg: ModelSection) -> dict[str, Tensor]:
    """Returns open_clip's weights under the names and in the shapes of a CLIPModel of one rank."""
    grid = grid_of_one()
    ours = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    state = model.state_dict()
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    return convert_state(OPEN_CLIP.rules(Contents("clip", cfg), state), state, shapes)
