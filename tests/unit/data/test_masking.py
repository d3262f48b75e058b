"""Block masks against the statistics of BEiT's generator; patch dropout."""

import numpy as np
import pytest

from megaeva.config.schema import MaskSection
from megaeva.data.masking import block_mask, keep_indices

_EVA = MaskSection(num_masked=105, min_block=16, min_aspect=0.3)


def test_statistics_of_eva_masks() -> None:
    rng = np.random.default_rng(0)
    num = 4_000
    masks = np.stack([block_mask(rng, 16, _EVA) for _ in range(num)])
    count = masks.sum(axis=(1, 2))
    assert masks.dtype == bool
    assert masks.shape[1:] == (16, 16)
    assert count.max() == 105
    assert count.min() >= 90
    # ../shared/facts.md 3a: mean 104.44, =105 in 65 %. Four standard errors, and half of the last printed digit.
    assert abs(count.mean() - 104.44) < 4 * count.std() / num**0.5 + 0.005
    assert abs((count == 105).mean() - 0.65) < 4 * (0.65 * 0.35 / num) ** 0.5 + 0.005
    # No side is preferred: the chance of a patch to be masked is the same under flips and transposition.
    share = masks.mean(axis=0)
    error = 4 * (0.41 * 0.59 / num) ** 0.5 * 2**0.5
    for other in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - other).mean() < error / 2
        assert np.abs(share - other).max() < 1.5 * error


def test_masks_are_blocks_not_noise() -> None:
    mask = block_mask(np.random.default_rng(1), 16, _EVA)
    same_as_right = (mask[:, 1:] == mask[:, :-1]).mean()
    assert same_as_right > 0.75  # independent patches would give 0.52


def test_demo_masks_are_never_empty_and_never_too_many() -> None:
    rng = np.random.default_rng(2)
    demo = MaskSection(num_masked=6, min_block=2)
    count = np.array([block_mask(rng, 4, demo).sum() for _ in range(2_000)])
    assert count.min() >= 1
    assert count.max() == 6
    assert count.mean() > 5


def test_one_patch_is_masked_where_no_block_fits() -> None:
    assert block_mask(np.random.default_rng(3), 1, MaskSection(num_masked=1, min_block=1)).tolist() == [[True]]


def test_a_mask_is_a_function_of_its_generator() -> None:
    first, again, other = (block_mask(np.random.default_rng(seed), 16, _EVA) for seed in (4, 4, 5))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("num_patches", "dropout", "kept"), [(256, 0.5, 128), (196, 0.4, 117), (4, 0.9, 1), (9, 0.0, 9)]
)
def test_kept_patches(num_patches: int, dropout: float, kept: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([keep_indices(rng, num_patches, dropout) for _ in range(500)])
    assert rows.shape == (500, kept)
    assert rows.dtype == np.int64
    assert all(len(set(row)) == kept for row in rows.tolist())
    chosen = np.bincount(rows.ravel(), minlength=num_patches) / 500
    expected = kept / num_patches
    assert np.abs(chosen - expected).max() <= 5 * (expected * (1 - expected) / 500) ** 0.5
