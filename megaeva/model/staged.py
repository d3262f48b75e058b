"""A tower with pipeline stages outside a training step: its output without gradient, on every stage."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megaeva.data.batch import Batch
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.schedule import Part, forward_rows
from megaeva.parallel.wrap import Tower


def forward_staged(
    name: str,
    module: Any,
    vision: VisionTower,
    batch: Batch,
    forward: Callable[[Batch, Tensor | None, int], Tensor],
    embed_dim: int,
) -> Tensor:
    """Returns the output rows [X, E] of a module around `vision` for images without patch dropout.

    All ranks of the tower call it and get the same. The batch goes through in one microbatch for each stage, filled up
    with copies of its last image; with masks a row is a masked patch and those add none, else a row is an image and
    theirs come last.

    Args:
        name: the module's, for the notes of `watch`.
        forward: as `Part.forward`.
    """
    grid = vision.grid
    padded = batch.padded(grid.pp_size)
    part = Part(
        Tower(name, module, module, grid),
        padded.in_parts(grid.pp_size),
        forward,
        num_stage_tokens=vision.num_stage_tokens(None),
        embed_dim=embed_dim,
    )
    return forward_rows(part, len(padded) if padded.mask_BN is None else int(padded.mask_BN.sum()))
