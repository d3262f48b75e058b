"""Rules of tp_comm_overlap, which only Transformer Engine on GPUs has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaeva.config import load
from megaeva.errors import ConfigError, UserError
from megaeva.tasks.transfers import overlap_transfers, training_shape

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "demo_clip.yaml"
ON = ("parallel.vision.tp_comm_overlap=true", "parallel.vision.tp=2", "parallel.vision.sequence_parallel=true")


def test_it_needs_tensor_and_sequence_parallelism() -> None:
    load(RECIPE, [*ON, "platform=auto"])
    for without in ON[1:]:
        with pytest.raises(ConfigError, match=r"needs parallel\.vision\.tp above 1.*sequence_parallel=true"):
            load(RECIPE, ["platform=auto", *(key for key in ON if key != without)])


def test_it_is_refused_where_it_cannot_work() -> None:
    with pytest.raises(ConfigError, match="must be false with platform=cpu"):
        load(RECIPE, [*ON, "platform=cpu"])
    with pytest.raises(ConfigError, match=r"must be false with train\.fp8\.recipe=blockwise"):
        load(RECIPE, [*ON, "platform=auto", "train.precision=fp8", "train.fp8.recipe=blockwise"])
    with pytest.raises(ConfigError, match="captions end with a batch's longest"):
        load(RECIPE, ["parallel.text.tp_comm_overlap=true"])


def test_a_cpu_that_auto_finds_says_so() -> None:
    runtime: Any = SimpleNamespace(layer_spec="local", device=torch.device("cpu"), world_size=2)
    with pytest.raises(UserError, match="tp_comm_overlap=true needs GPUs"):
        overlap_transfers(load(RECIPE, [*ON, "platform=auto"]), runtime)
    overlap_transfers(load(RECIPE, ["platform=auto"]), runtime)


def test_buffers_have_the_shape_of_most_steps() -> None:
    sizes = ["platform=auto", *ON, "train.global_batch_size=64", "train.micro_batch_size=16"]
    patches = load(RECIPE, sizes).model.vision.num_patches
    whole, half = -(-(patches + 1) // 2) * 2, -(-(patches // 2 + 1) // 2) * 2
    assert training_shape(load(RECIPE, sizes), 4) == (whole, 16)
    assert training_shape(load(RECIPE, [*sizes, "data.frames=4"]), 4) == (whole, 16), "four videos of four images"
    phases = "[{samples: 640, train: [a.tar]}, {samples: 6400, train: [a.tar], patch_dropout: 0.5}]"
    cfg = load(RECIPE, [*sizes, "data.train=[]", f"data.phases={phases}", "train.total_samples=7040"])
    assert training_shape(cfg, 4) == (half, 16)
