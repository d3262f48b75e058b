"""Which patches the student does not see (MIM), and which ones patch dropout keeps (contrastive)."""

import math

import numpy as np
from numpy.typing import NDArray

from megaeva.config.schema import MaskSection
from megaeva.config.topology import num_kept

_ATTEMPTS_PER_BLOCK = 10


def block_mask(rng: np.random.Generator, grid: int, mask: MaskSection) -> NDArray[np.bool_]:
    """A block-wise mask, bool [grid, grid], True where the student sees the mask token.

    Blocks of random area and aspect are placed until `mask.num_masked` patches are covered or ten attempts in a row
    find no place, so the count varies and never exceeds `num_masked` (105 of 256 at EVA's settings: mean 104.44).
    Source: BEiT's MaskingGenerator as in EVA-02 (asuka/masking_generator.py). One difference: where not even a first
    block fits, one random patch is masked, so that every image has a target.
    """
    covered = np.zeros((grid, grid), dtype=bool)
    left_to_mask = mask.num_masked
    while left_to_mask > 0 and (added := _add_block(rng, covered, left_to_mask, mask)):
        left_to_mask -= added
    if not covered.any():
        covered.flat[rng.integers(covered.size)] = True
    return covered


def _add_block(rng: np.random.Generator, covered: NDArray[np.bool_], most: int, mask: MaskSection) -> int:
    """Covers one more block in place; the number of newly covered patches, at most `most`; 0: no place was found."""
    grid = len(covered)
    log_aspect = math.log(mask.min_aspect)
    for _ in range(_ATTEMPTS_PER_BLOCK):
        # Near the end `most` is below min_block; upstream then draws between the two, and so do we.
        area = mask.min_block + (most - mask.min_block) * rng.random()
        aspect = math.exp(log_aspect * (1 - 2 * rng.random()))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < grid and 0 < width < grid):
            continue
        top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        block = covered[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            return added
    return 0


def keep_indices(rng: np.random.Generator, num_patches: int, patch_dropout: float) -> NDArray[np.int64]:
    """The patches that survive dropout, int64 [`num_kept`], distinct, in random order.

    Source: open_clip's PatchDropout (top K of a normal draw for each patch); cls is not counted and always kept.
    """
    kept = num_kept(num_patches, patch_dropout)
    return np.argsort(-rng.standard_normal(num_patches))[:kept].astype(np.int64)
