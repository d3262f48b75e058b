"""The same training on any layout of ranks, through the product's own code, and by definition on a single process.

A run's randomness (drop path) is a function of the pass: its number in the global batch. Whatever the layout, pass k
sees the same samples in the same order, so a single process that makes the same passes, seeded as the layout seeds
them, must compute the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, nn

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
from megaeva.config.world import world_fault
from megaeva.data.batch import Batch
from megaeva.losses import clip_loss
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.optim.build import build_optimizer
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.shards import full_shape, slice_full
from megaeva.parallel.wrap import Tower, finish_parameter_gather, reduce_gradients, zero_gradients
from megaeva.tasks.contrastive import Contrastive
from megaeva.tasks.mim import MIM
from tests.helpers.layouts import Layout
from tests.helpers.tiny import random_state, tiny
from tests.helpers.toy_towers import whole_tensors

VARIANTS = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14")
TASKS = ("contrastive", "mim")
NUM_STEPS = 20
"""Steps of a whole run; a shorter one is its beginning."""
SEED = 5
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One run of `num_steps` of the NUM_STEPS.

    Attributes:
        task: one of TASKS.
        variant: the model that is shrunken.
        frozen: towers that are not trained.
    """

    layout: Layout
    task: str
    variant: str
    num_steps: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    frozen: tuple[Literal["vision", "text"], ...] = ()

    @property
    def single(self) -> "Case":
        """The single process that does the same."""
        return replace(self, layout=self.layout.reference)

    @property
    def exact(self) -> "Case":
        """The single process in fp32."""
        return replace(self.single, precision="fp32")


def make_recipe(case: Case) -> Config:
    """A recipe of small sizes, its rules not checked: AdamW at lr 1e-3 falling as a cosine over the run, layer decay,
    clipping that binds in most steps."""
    layout = case.layout
    heads = {
        "num_heads": layout.num_heads,
        "hidden_size": 8 * layout.num_heads,
        "ffn_hidden_size": 11 * layout.num_heads,
    }
    model = tiny(case.variant, num_layers=layout.num_layers, **heads)
    vision = model.vision.model_copy(update={"patch_dropout": 0.5, "drop_path": layout.drop_path})
    mim = case.task == "mim"
    second = "teacher" if mim else "text"
    cfg = Config(
        task="mim" if mim else "contrastive",
        run_dir="unused",
        model=model.model_copy(update={"vision": vision}),
        teacher=TeacherSection(checkpoint="unused") if mim else None,
        mim=MIMSection(mask=MaskSection(num_masked=4, min_block=1)) if mim else None,
        parallel=ParallelSection(
            vision=layout.vision,
            distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=layout.overlap,
            **{second: layout.second},
        ),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-3, layer_decay=0.9), clip_grad_norm=0.5, frozen=case.frozen),
        train=TrainSection(
            total_samples=NUM_STEPS * layout.num_samples,
            global_batch_size=layout.num_samples,
            micro_batch_size=layout.num_samples // layout.num_passes,
            precision=case.precision,
        ),
    )
    assert world_fault(cfg, layout.num_ranks) is None, world_fault(cfg, layout.num_ranks)
    return cfg


def whole_batch(cfg: Config, step: int) -> Batch:
    """The global batch of a step: captions of all lengths, half of the patches dropped, ragged masks."""
    generator = torch.Generator().manual_seed(1000 + step)
    vision, text, num_samples = cfg.model.vision, cfg.model.text, cfg.train.global_batch_size
    token_BL = torch.randint(1, text.vocab_size - 1, (num_samples, text.context_length), generator=generator)
    for row, length in enumerate(torch.randint(2, text.context_length, (num_samples,), generator=generator)):
        token_BL[row, length] = text.vocab_size - 1  # end of text: the largest id
        token_BL[row, length + 1 :] = 0
    kept = vision.num_patches // 2
    order = torch.rand(num_samples, vision.num_patches, generator=generator).argsort(1)
    # From 1 masked patch to half of them.
    mask_BN = order < torch.linspace(1, kept, num_samples).int()[:, None]
    return Batch(
        image_BCHW=torch.randn(num_samples, 3, vision.image_size, vision.image_size, generator=generator),
        keys=tuple(map(str, range(num_samples))),
        token_BL=token_BL if cfg.task == "contrastive" else None,
        mask_BN=mask_BN if cfg.task == "mim" else None,
        keep_BK=order[:, :kept] if cfg.task == "contrastive" else None,
    )


def contrastive_task(
    runtime: Runtime, model: ModelSection, axes: AxesSection, *, num_samples: int, micro_batch_size: int
) -> Contrastive:
    """The task of a global batch in fp32, its vision tower on `axes`; with no optimizer state to shard."""
    cfg = Config(
        task="contrastive",
        run_dir="unused",
        model=model,
        parallel=ParallelSection(vision=axes, distributed_optimizer=False),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-2)),
        train=TrainSection(
            total_samples=64, global_batch_size=num_samples, micro_batch_size=micro_batch_size, precision="fp32"
        ),
    )
    return Contrastive(cfg, runtime)


@torch.no_grad()
def fill(module: nn.Module, grid: Grid) -> None:
    """Weights that hide nothing, the same on every layout: no norm is one, no bias and no branch zero.

    Matrices are half of what keeps hidden states at order one. At full size the attention of the post-norm towers is so
    sharp that one unit in the last place of the image moves a single process's gradient by 1e-4; so by 3e-6 at most.
    All are rounded to bf16, so that a run in bf16 starts from the same.
    """
    for name, parameter in module.named_parameters():
        full = random_state({name: full_shape(parameter, grid.tp_size)}, seed=crc32(name.encode()))[name]
        full = (full / 2 if full.ndim > 1 else full).bfloat16()
        parameter.copy_(slice_full(full, parameter, grid.tp_rank, grid.tp_size))


class FreshTeacherMIM(MIM):
    """A teacher without a checkpoint: the student's own architecture with other weights."""

    def _load_teacher(self, cfg: Config) -> tuple[Teacher, int, list[str]]:
        grid, precision = self.grids["teacher"], cfg.train.precision
        tower = VisionTower(cfg.model.vision, cfg.model.embed_dim, grid=grid, precision=precision)
        fill(tower, grid)
        return Teacher(tower), cfg.model.embed_dim, []


def plain_step(task: Contrastive | MIM, batches: Sequence[Batch], seed: Callable[[int], None]) -> float:
    """The loss and its gradients by definition, on one process: one graph of all passes, one backward."""
    zero_gradients(task.towers)
    outputs = []
    tower = task.towers[0].ddp  # vision or student
    for index, batch in enumerate(batches):
        seed(index)
        outputs.append(tower(batch.image_BCHW, batch.mask_BN if isinstance(task, MIM) else batch.keep_BK))
    if isinstance(task, MIM):
        target_ME = torch.cat([task.teacher(batch.image_BCHW)[batch.mask_BN] for batch in batches])
        loss = -torch.nn.functional.cosine_similarity(torch.cat(outputs).float(), target_ME.float(), dim=-1).mean()
    else:
        text_BE = torch.cat([task.text.ddp(batch.token_BL) for batch in batches])
        loss = clip_loss(torch.cat(outputs), text_BE, task.scale.ddp())
    loss.backward()
    reduce_gradients(task.towers)
    return loss.item()


@dataclass(frozen=True)
class Run:
    """What a case computed, whole on every rank.

    Attributes:
        fresh: the parameters that the product initialises; training starts from others, see `fill`.
        losses: of each step; norms: of each step's gradient, before it was clipped.
        gradients: of the first step; empty under the distributed optimizer, whose ranks keep shards.
        first: parameters after the first step; last: after the last.
    """

    fresh: Tensors
    losses: list[float]
    norms: list[float]
    gradients: Tensors
    first: Tensors
    last: Tensors


def run_case(runtime: Runtime, case: Case) -> Run:
    """Runs it; all ranks call it together."""
    torch.manual_seed(runtime.rank)  # nothing may depend on the state of the default generator
    layout = case.layout
    cfg = make_recipe(case)
    task: Contrastive | MIM = Contrastive(cfg, runtime) if cfg.task == "contrastive" else FreshTeacherMIM(cfg, runtime)
    fresh = whole_weights(task.towers)
    for tower in task.towers:
        if tower.name != "scale":
            fill(tower.module, tower.grid)
    start = whole_weights(tower for tower in task.towers if tower.name in case.frozen)
    optimizer, learning_rate = build_optimizer(task.towers, cfg)
    losses, norms = [], []
    gradients: Tensors = {}
    first: Tensors = {}
    for step in range(case.num_steps):

        def seed(microbatch: int, step: int = step) -> None:
            seed_pass(SEED, step, microbatch)

        batch = whole_batch(cfg, step).split(layout.num_samples // task.grid.dp_size)[task.grid.dp_rank]
        learning_rate.set(step)
        if layout.plain_blocks:
            losses.append(plain_step(task, batch.split(layout.num_samples // layout.num_passes), seed))
        else:
            losses.append(task.step(batch, seed).item())
        if step == 0 and not layout.distributed_optimizer:
            gradients = _union(whole_tensors(tower, _gradients(tower)) for tower in task.towers)
        updated, norm = optimizer.step()
        assert updated
        norms.append(norm)
        task.after_step()
        if step == 0:
            first = whole_weights(task.towers)
    last = whole_weights(task.towers)
    assert all(torch.equal(last[name], weight) for name, weight in start.items())
    return Run(fresh, losses, norms, gradients, first, last)


def whole_weights(towers: Iterable[Tower]) -> Tensors:
    """Every parameter of all towers, whole, in fp32, on every rank."""
    towers = list(towers)
    finish_parameter_gather(towers)
    return _union(whole_tensors(tower, dict(tower.module.named_parameters())) for tower in towers)


def _gradients(tower: Tower) -> Tensors:
    return {name: p.main_grad for name, p in tower.module.named_parameters() if p.requires_grad}


def _union(parts: Iterable[Tensors]) -> Tensors:
    return {name: tensor.float() for part in parts for name, tensor in part.items()}
