"""Loss and all gradients of a step on several ranks, and in several microbatches, equal the single-process step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import (
    AxesSection,
    Config,
    MaskSection,
    MIMSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    TeacherSection,
    TowerOptimSection,
    TrainSection,
)
from megaeva.config.variants import VARIANTS
from megaeva.data.batch import Batch
from megaeva.model.init import init_weights
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.shards import gather_full
from megaeva.tasks.contrastive import Contrastive
from megaeva.tasks.mim import MIM
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny

NUM_SAMPLES = 8
DEMO = ("Demo-Teacher", "Demo-Student")
FAMILIES = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14")
MODELS = {name: ModelSection(variant=name, **VARIANTS[name]) for name in DEMO} | {name: tiny(name) for name in FAMILIES}
CASES = [(task, name) for name in MODELS for task in ("contrastive", "mim")]
Result = tuple[float, dict[str, Tensor]]


class FreshTeacherMIM(MIM):
    """A teacher without a checkpoint: the student's own architecture with other weights."""

    def _load_teacher(self, cfg: Config) -> tuple[Teacher, int, list[str]]:
        tower = VisionTower(
            cfg.model.vision, cfg.model.embed_dim, grid=self.grid, precision="fp32", device=self.runtime.device
        )
        init_weights(tower, seed=99, task="contrastive", grid=self.grid)
        return Teacher(tower), cfg.model.embed_dim, []


def recipe(task: str, model: ModelSection, tp: int, recompute: Any) -> Config:
    axes = AxesSection(tp=tp, recompute=recompute)
    vision = model.vision.model_copy(update={"patch_dropout": 0.5, "drop_path": 0.0})
    return Config(
        task=task,
        run_dir="unused",
        model=model.model_copy(update={"vision": vision}),
        teacher=TeacherSection(checkpoint="unused") if task == "mim" else None,
        mim=MIMSection(mask=MaskSection(num_masked=4, min_block=1)) if task == "mim" else None,
        parallel=ParallelSection(vision=axes, text=axes, distributed_optimizer=False),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-3)),
        train=TrainSection(total_samples=NUM_SAMPLES, global_batch_size=NUM_SAMPLES, precision="fp32"),
    )


def whole_batch(model: ModelSection, task: str) -> Batch:
    generator = torch.Generator().manual_seed(3)
    vision, text = model.vision, model.text
    token_BL = torch.randint(1, text.vocab_size - 1, (NUM_SAMPLES, text.context_length), generator=generator)
    for row, length in enumerate(torch.randint(2, text.context_length, (NUM_SAMPLES,), generator=generator)):
        token_BL[row, length] = text.vocab_size - 1  # end of text: the largest id
        token_BL[row, length + 1 :] = 0
    kept = vision.num_patches // 2
    order = torch.rand(NUM_SAMPLES, vision.num_patches, generator=generator).argsort(1)
    # Ragged masks: from 1 masked patch to half of them.
    mask_BN = order < torch.linspace(1, kept, NUM_SAMPLES).int()[:, None]
    return Batch(
        image_BCHW=torch.randn(NUM_SAMPLES, 3, vision.image_size, vision.image_size, generator=generator),
        keys=tuple(map(str, range(NUM_SAMPLES))),
        token_BL=token_BL if task == "contrastive" else None,
        mask_BN=mask_BN if task == "mim" else None,
        keep_BK=order[:, :kept] if task == "contrastive" else None,
    )


def one_step(
    runtime: Runtime, task_name: str, model: ModelSection, tp: int, num_microbatches: int, recompute: Any
) -> Result:
    cfg = recipe(task_name, model, tp, recompute)
    task = Contrastive(cfg, runtime) if task_name == "contrastive" else FreshTeacherMIM(cfg, runtime)
    grid = task.grid
    mine = whole_batch(cfg.model, task_name).split(NUM_SAMPLES // grid.dp_size)[grid.dp_rank]
    batches = mine.split(len(mine) // num_microbatches)
    loss = task.step(batches, lambda index: seed_pass(0, 0, index, grid.dp_rank))
    gradients = {
        f"{tower.name}.{name}": gather_full(parameter.main_grad, parameter, grid).clone()
        for tower in task.towers
        for name, parameter in tower.module.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), gradients


def all_steps(runtime: Runtime, tp: int, num_microbatches: int, recompute: Any) -> list[Result] | None:
    torch.manual_seed(runtime.rank)  # nothing may depend on the state of the default generator
    results = [one_step(runtime, task, MODELS[name], tp, num_microbatches, recompute) for task, name in CASES]
    return results if runtime.is_main else None


@pytest.fixture(scope="module")
def single() -> list[Result]:
    (results,) = run_ranks(all_steps, 1, 1, 1, "none", timeout=300)
    return results


@pytest.mark.parametrize(
    ("num_ranks", "tp", "num_microbatches", "recompute"),
    [
        pytest.param(1, 1, 4, "none", id="accumulate4"),
        pytest.param(2, 2, 1, "none", id="tp2"),
        pytest.param(2, 2, 2, "full", id="tp2_accumulate2_recompute_full"),
        pytest.param(2, 1, 1, "none", id="dp2"),
        pytest.param(2, 1, 2, "selective", id="dp2_accumulate2_recompute_selective"),
        pytest.param(4, 2, 1, "none", id="tp2_dp2"),
    ],
)
def test_step_equals_single_process(
    single: Any, num_ranks: int, tp: int, num_microbatches: int, recompute: Any
) -> None:
    parallel = run_ranks(all_steps, num_ranks, tp, num_microbatches, recompute, timeout=300)[0]
    assert parallel is not None
    for (task, name), (loss, gradients), (exact_loss, exact) in zip(CASES, parallel, single, strict=True):
        assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss), (task, name, loss, exact_loss)
        assert gradients.keys() == exact.keys()
        whole = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
        assert whole > 0
        for parameter, gradient in exact.items():
            difference = (gradients[parameter] - gradient).norm()
            # A key bias has gradient zero up to rounding: measure such tensors against the whole gradient.
            scale = max(gradient.norm(), 1e-3 * whole)
            assert difference <= 1e-5 * scale, (task, name, parameter, (difference / scale).item())
