"""Warm-up and cosine."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megaeva.config.schema import Config
from megaeva.optim.schedule import LearningRate, rate_share


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    shares = [rate_share(step, warmup_steps=4, total_steps=10, min_ratio=0.0) for step in range(10)]
    assert shares[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert shares[7] == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 6)))
    assert shares[9] > 0.0
    assert rate_share(10, warmup_steps=4, total_steps=10, min_ratio=0.0) == pytest.approx(0.0)


def test_cosine_ends_at_the_floor_and_stays() -> None:
    assert rate_share(100, warmup_steps=0, total_steps=100, min_ratio=0.1) == pytest.approx(0.1)
    assert rate_share(150, warmup_steps=0, total_steps=100, min_ratio=0.1) == pytest.approx(0.1)


def test_warmup_as_long_as_the_run() -> None:
    assert rate_share(3, warmup_steps=4, total_steps=4, min_ratio=0.0) == 1.0


def test_each_tower_has_its_peak_and_each_group_its_scale() -> None:
    cfg = SimpleNamespace(
        optim=SimpleNamespace(
            vision=SimpleNamespace(lr=1e-3, layer_decay=0.5),
            text=SimpleNamespace(lr=1e-4, layer_decay=1.0),
            logit_scale_lr=5e-4,
            warmup_steps=2,
            min_lr_ratio=0.0,
        ),
        train=SimpleNamespace(total_steps=10),
    )
    groups: list[dict[str, Any]] = [
        {"tower": "vision", "lr_mult": 0.25},
        {"tower": "vision", "lr_mult": 1.0},
        {"tower": "text", "lr_mult": 1.0},
    ]
    schedule = LearningRate(SimpleNamespace(param_groups=groups), cast(Config, cfg))
    assert schedule.set(0) == pytest.approx({"vision": 5e-4, "text": 5e-5})
    assert [group["lr"] for group in groups] == pytest.approx([1.25e-4, 5e-4, 5e-5])
    schedule.set(1)
    assert groups[0]["lr"] == pytest.approx(2.5e-4)
