"""fp16 training: the loss scale leaves no trace in fp32, gradients are as exact as fp16 is, a run goes on as it was."""

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import Fp16Section
from megaeva.data.synthetic import make_shards
from megaeva.errors import UserError
from megaeva.observability.metrics import read_metrics
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks.contrastive import Contrastive
from megaeva.trainer import Trainer
from tests.helpers.layouts import Layout
from tests.helpers.parallel_runs import SEED, TASKS, Case, FreshTeacherMIM, fill, make_recipe, whole_batch
from tests.helpers.trainer_recipe import model, trainer_recipe

STEPS = 5
Precision = Literal["fp32", "bf16", "fp16"]


def train(
    runtime: Runtime, name: str, microbatches: int, precision: Precision, scale: float = 1.0, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Losses of all steps, and the first one's gradients of the scaled loss."""
    cfg = make_recipe(Case(Layout("one process", microbatches=microbatches), name, "EVA02-CLIP-L-14", steps, precision))
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"fp16": Fp16Section(initial_scale=scale)})})
    task: Any = Contrastive(cfg, runtime) if name == "contrastive" else FreshTeacherMIM(cfg, runtime)
    for tower in task.towers:
        if tower.name != "scale":
            fill(tower.module, tower.grid)
    optimizer, rate = build_optimizer(task.towers, cfg)
    assert optimizer.loss_scale == (scale if precision == "fp16" else 1.0)
    losses, gradients = [], torch.empty(0)
    for step in range(steps):
        rate.set(step)
        losses.append(task.step(whole_batch(cfg, step), lambda index, step=step: seed_pass(SEED, step, index), scale))
        if step == 0:
            parameters = [p for tower in task.towers for p in tower.module.parameters()]
            gradients = torch.cat([p.main_grad.flatten() for p in parameters])
        assert optimizer.step()[0]
    return torch.stack(losses), gradients


@pytest.mark.parametrize("microbatches", [1, 4], ids=["one pass", "replayed"])
@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_those_of_the_scaled_loss(runtime: Runtime, task: str, microbatches: int) -> None:
    """A power of two changes no digit in fp32. fp16 has three digits more than bf16: an eighth of its error."""
    losses, exact = train(runtime, task, microbatches, "fp32")
    _, scaled = train(runtime, task, microbatches, "fp32", 1024.0, steps=1)
    assert torch.equal(scaled, 1024.0 * exact)
    fp16_losses, fp16 = train(runtime, task, microbatches, "fp16", 1024.0)
    bf16_losses, bf16 = train(runtime, task, microbatches, "bf16")
    error = (fp16 / 1024.0 - exact).norm() / (bf16 - exact).norm()
    assert 1 / 12 < error < 1 / 5
    assert (fp16_losses - losses).norm() < (bf16_losses - losses).norm() / 2


def recipe(folder: Path, name: str, **train: Any) -> Any:
    return trainer_recipe(
        folder,
        name,
        6,
        model=model(vision_layers=1, text_layers=1),
        optim={"vision": {"lr": 1e-3}, "clip_grad_norm": 1.0},
        save={"every_steps": 2, "asynchronous": False},
        train={"total_samples": 48, "global_batch_size": 8, "log_every_steps": 1, "precision": "fp16"} | train,
    )


class Died(Exception):
    """Stands for a killed job."""


def run(runtime: Runtime, cfg: Any, *, resume: bool = False, overflows: tuple[int, ...] = (), dies_at: int = -1) -> Any:
    """Trains it, with gradients that are not finite before some steps."""
    trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
    prepare = trainer.optimizer.prepare

    def poison() -> float:
        if trainer.next_step == dies_at:
            raise Died
        if trainer.next_step in overflows:
            trainer.task.towers[1].module.head.weight.main_grad[0, 0] = math.nan
        return prepare()

    trainer.optimizer.prepare = poison  # type: ignore[method-assign]
    trainer.fit()
    return trainer


def scenario(runtime: Runtime, root: Path) -> str:
    """A run that is cut off and resumed, one that goes on from fp32, and one without a smaller scale."""
    section = {"initial_scale": 64.0, "growth_interval": 3}
    run(runtime, recipe(root, "whole", fp16=section), overflows=(0,))
    cut = recipe(root, "cut", fp16=section)
    with pytest.raises(Died):
        run(runtime, cut, overflows=(0,), dies_at=3)
    run(runtime, cut, resume=True)

    with pytest.raises(Died):
        run(runtime, recipe(root, "from fp32", precision="fp32"), dies_at=3)
    run(runtime, recipe(root, "from fp32", fp16={"initial_scale": 32.0}), resume=True)

    with pytest.raises(UserError) as caught:
        run(runtime, recipe(root, "collapse", fp16={"initial_scale": 2.0}), overflows=(2, 3))
    return str(caught.value)


def test_a_run_goes_on_at_its_scale_and_ends_at_the_smallest(runtime: Runtime, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=24, image_size=40, seed=0)
    message = scenario(runtime, tmp_path)
    names = ("step", "loss", "loss_scale", "skipped_steps", "grad_norm/vision", "update_rms/text")
    whole, cut = (
        [{name: line.get(name) for name in names} for line in read_metrics(tmp_path / run)] for run in ("whole", "cut")
    )
    assert cut == whole, "bit for bit"
    assert [line["loss_scale"] for line in whole] == [64.0, 32.0, 32.0, 32.0, 64.0, 64.0]
    assert [line["skipped_steps"] for line in whole] == [1] * 6
    scales = [line.get("loss_scale") for line in read_metrics(tmp_path / "from fp32")]
    assert scales == [None, None, 32.0, 32.0, 32.0, 32.0]

    assert message.startswith("step 3: the loss scale collapses: gradients overflow fp16 at loss_scale=1 too")
    assert "train.fp16.min_scale" in message
    assert "bad_batch_step_3.json" in message and "step_00000002" in message, "samples, and where to continue"
    assert (tmp_path / "collapse" / "bad_batch_step_3.json").exists()
