"""The losses a recipe can name train alike on one and two ranks; SigLIP's bias is trained, logged, saved and read."""

import math
from pathlib import Path
from typing import Any

import pytest

from megaeva.config.schema import Config, LossSection, OptimSection, TowerOptimSection, TrainSection
from megaeva.data.batch import Batch
from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks.contrastive import Contrastive
from megaeva.trainer import Trainer
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny
from tests.helpers.trainer_recipe import model, trainer_recipe

NUM_SAMPLES, STEPS = 8, 4
SIGLIP = {"init": math.log(10), "bias": -10.0}
LOSSES = (LossSection(name="sigmoid"), LossSection(label_smoothing=0.1))


def recipe(loss: LossSection) -> Config:
    section = tiny("Demo-Student")
    if loss.name == "sigmoid":
        section = section.model_copy(update={"logit_scale": section.logit_scale.model_copy(update=SIGLIP)})
    return Config(
        task="contrastive",
        run_dir="unused",
        model=section,
        loss=loss,
        optim=OptimSection(vision=TowerOptimSection(lr=1e-4), logit_scale_lr=1e-2, weight_decay=0.1),
        train=TrainSection(total_samples=64, global_batch_size=NUM_SAMPLES, micro_batch_size=2, precision="fp32"),
    )


def train(runtime: Runtime) -> list[list[dict[str, float]]]:
    """The figures of each step with each loss, on the same eight samples."""
    runs = []
    for loss in LOSSES:
        cfg = recipe(loss)
        task = Contrastive(cfg, runtime)
        optimizer, rate = build_optimizer(task.towers, cfg)
        images, tokens = example_images(cfg.model, NUM_SAMPLES), example_tokens(cfg.model, NUM_SAMPLES)
        whole = Batch(images, tuple(map(str, range(NUM_SAMPLES))), tokens)
        batch = whole.split(NUM_SAMPLES // task.grid.dp_size)[task.grid.dp_rank]
        steps = []
        for step in range(STEPS):
            rate.set(step)
            value = task.step(batch, lambda index, step=step: seed_pass(0, step, index))
            assert optimizer.step()[0]
            steps.append({"loss": value.item()} | task.after_step())
        runs.append(steps)
    return runs


def test_both_losses_train_alike_on_one_and_two_ranks() -> None:
    (alone,) = run_ranks(train, 1)
    first, second = run_ranks(train, 2)
    assert first == second
    for loss, expected, found in zip(LOSSES, alone, first, strict=True):
        assert expected[-1]["loss"] < expected[0]["loss"]
        for step, (one, two) in enumerate(zip(expected, found, strict=True)):
            assert two == pytest.approx(one, rel=1e-5), (loss, step)
    biases = [step["logit_bias"] for step in alone[0]]
    assert len(set(biases)) == STEPS and all(abs(bias + 10) < STEPS * 0.011 for bias in biases), (
        "its own rate, no decay"
    )
    assert "logit_bias" not in alone[1][0]


def sigmoid_run(folder: Path, name: str, **sections: Any) -> Config:
    own = {
        "model": model(vision_layers=1, text_layers=1) | {"logit_scale": SIGLIP},
        "loss": {"name": "sigmoid"},
        "optim": {"vision": {"lr": 1e-3}, "logit_scale_lr": 1e-2},
    }
    return trainer_recipe(folder, name, 2, **(own | sections))


def fit(runtime: Runtime, folder: str) -> None:
    assert Trainer(sigmoid_run(Path(folder), "siglip"), runtime, resume=False, recipe_changes=[]).fit() == 0


def test_the_bias_is_logged_saved_and_read_on_other_ranks(runtime: Runtime, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=16, image_size=40, seed=0)
    run_ranks(fit, 2, str(tmp_path))
    logged = [line["logit_bias"] for line in read_metrics(tmp_path / "siglip") if "logit_bias" in line]
    assert len(logged) == 2 and -10 != logged[0] != logged[1]

    start = {"clip": str(tmp_path / "siglip")}
    scale = Contrastive(sigmoid_run(tmp_path, "next", init=start), runtime).model.scale
    assert scale.logit_bias is not None and scale.logit_bias.item() == logged[-1]
    # Each loss may go on from the other's weights.
    without = {"model": model(vision_layers=1, text_layers=1), "loss": {}}
    softmax = Contrastive(sigmoid_run(tmp_path, "softmax", init=start, **without), runtime)
    assert softmax.model.scale.logit_bias is None
    assert "scale.logit_bias" in softmax.start_reports[0].unused, "not used, and said so"
