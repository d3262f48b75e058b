"""The frozen tower whose features are distilled."""

import torch
from torch import Tensor, nn

from megaeva.model.vision_tower import VisionTower


class Teacher(nn.Module):
    """A CLIP vision tower without gradients and without drop path."""

    def __init__(self, vision: VisionTower) -> None:
        """Freezes `vision`, which must have a head."""
        super().__init__()
        self.vision = vision.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Returns itself, still in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Returns target_BNE: patch tokens after final norm and projection, cls dropped, not normalised.

        Source: facts.md 3a; EVA found the projected feature the better target.
        """
        return self.vision.project(self.vision.tokens(image_BCHW)[:, 1:])
