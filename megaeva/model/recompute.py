"""Activation recomputation: what a tower drops in the forward pass and computes again in the backward pass."""

from typing import Literal

from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower


def set_recompute(tower: VisionTower | TextTower, mode: Literal["none", "selective", "full"] | int) -> None:
    """Makes the tower recompute from the next forward pass on; gradients stay the same to the last bit on a CPU.

    mcore's TransformerBlocks do it, with drop path repeated; they read the mode from the tower's config at each pass.

    Args:
        mode: "selective" keeps all but the attention's inner activations; "full" keeps only each layer's input and
            costs one more forward pass; a number does that for the first so many layers of each virtual pipeline stage
            (of the tower where there is no pipeline) and keeps the rest.
    """
    config = tower.config
    config.recompute_granularity = {"none": None, "selective": "selective"}.get(str(mode), "full")
    if config.recompute_granularity == "full":
        whole = mode == "full"
        config.recompute_method = "uniform" if whole else "block"
        config.recompute_num_layers = 1 if whole else mode
