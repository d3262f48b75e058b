"""How stages, data ranks and microbatches are counted."""

import pytest

from megaeva.config.schema import AxesSection, Config
from megaeva.config.topology import data_ranks, microbatches, sharing_ranks, virtual_stages
from megaeva.config.variants import VARIANTS


@pytest.mark.parametrize(
    ("axes", "num_layers", "sizes"),
    [
        (AxesSection(), 5, [5]),
        (AxesSection(pp=2), 6, [3, 3]),
        (AxesSection(pp=4), 9, [2, 3, 2, 2]),  # the ends are lighter
        (AxesSection(pp=4), 10, [2, 3, 3, 2]),
        (AxesSection(pp=2, vpp=2), 6, [1, 2, 2, 1]),
        (AxesSection(pp=3, layers_per_stage=(1, 4, 2)), 7, [1, 4, 2]),
    ],
)
def test_virtual_stages(axes: AxesSection, num_layers: int, sizes: list[int]) -> None:
    stages = virtual_stages(axes, num_layers)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def _config(batch: int = 96, micro: int | None = None, **parallel: AxesSection) -> Config:
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "unused",
            "model": VARIANTS["EVA-CLIP-18B"],
            "parallel": parallel,
            "optim": {"vision": {"lr": 1e-3}},
            "train": {"total_samples": 960, "global_batch_size": batch, "micro_batch_size": micro},
        }
    )


@pytest.mark.parametrize(
    ("micro", "vision", "text"), [(None, (24, 1), (12, 1)), (8, (8, 3), (6, 2)), (1, (1, 24), (1, 12))]
)
def test_microbatches(micro: int | None, vision: tuple[int, int], text: tuple[int, int]) -> None:
    cfg = _config(96, micro)
    assert microbatches(cfg, AxesSection(tp=2, pp=2), 16) == vision
    assert microbatches(cfg, AxesSection(tp=2), 16) == text


@pytest.mark.parametrize(
    ("micro", "frames", "expected"),
    [(None, 8, (24, 1)), (8, 8, (1, 24)), (12, 3, (4, 6)), (24, 4, (6, 4)), (8, 3, (2, 12)), (2, 8, (1, 24))],
)
def test_a_microbatch_counts_the_frames_of_videos(micro: int | None, frames: int, expected: tuple[int, int]) -> None:
    """A share of 24; parts are whole parts of those of images, so that the stages of a pipeline still get as many."""
    assert microbatches(_config(96, micro), AxesSection(tp=2, pp=2), 16, frames) == expected


def test_blocks_of_ranks() -> None:
    assert sharing_ranks(_config(vision=AxesSection(tp=2, pp=3), text=AxesSection(tp=4))) == 12
    assert data_ranks(AxesSection(tp=2, pp=3), 24) == 4
    assert data_ranks(AxesSection(tp=2, pp=3), 4) == 0
