"""Masked feature distillation: the student sees masked patches, the frozen teacher the whole crop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaeva.checkpoint.layout import read_model_section
from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.errors import ConfigError
from megaeva.eval.masked import evaluate_masked
from megaeva.losses.feature_distill import negative_cosine_share
from megaeva.model.init import init_weights
from megaeva.model.mim_student import MIMStudent
from megaeva.model.recompute import set_recompute
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.collectives import all_sum
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.schedule import local_step
from megaeva.parallel.wrap import Tower, wrap


class MIM:
    """See `megaeva.tasks.base.Task`."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        assert cfg.mim is not None, "config.validate requires it for this task"
        self.cfg, self.runtime = cfg, runtime
        self.grid = build_grid(cfg.parallel.vision, runtime)
        self.teacher, teacher_dim, report = self._load_teacher(cfg)
        self.student = MIMStudent(
            cfg.model.vision,
            teacher_dim,
            grid=self.grid,
            precision=cfg.train.precision,
            layer_spec=runtime.layer_spec,
            device=runtime.device,
            stop_grad_patch_embed=cfg.mim.stop_grad_patch_embed,
        )
        set_recompute(self.student.vision, cfg.parallel.vision.recompute)
        init_weights(self.student, seed=cfg.seed, task="mim", grid=self.grid)
        self.start_report = report
        if cfg.init.vision:
            self.start_report += load_weights(
                cfg.init.vision, {"vision": self.student.vision}, self.grid, skip=("vision.head",)
            ).lines()
        self.towers: Sequence[Tower] = [wrap("student", self.student, self.grid, cfg.parallel)]
        self.num_global_tokens = 0.0

    def _load_teacher(self, cfg: Config) -> tuple[Teacher, int, list[str]]:
        assert cfg.teacher is not None
        section = read_model_section(cfg.teacher.checkpoint)
        sizes = [(vision.image_size, vision.patch_size) for vision in (section.vision, cfg.model.vision)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"teacher.checkpoint={cfg.teacher.checkpoint} sees {sizes[0][0]} px images in patches of {sizes[0][1]} "
                f"px, the student model.vision {sizes[1][0]} px in patches of {sizes[1][1]}; both see one crop and are "
                f"compared patch by patch, so these must be equal: change model.vision.image_size and patch_size."
            )
        tower = VisionTower(
            section.vision,
            section.embed_dim,
            grid=self.grid,
            precision=cfg.train.precision,
            layer_spec=self.runtime.layer_spec,
            device=self.runtime.device,
        )
        report = load_weights(cfg.teacher.checkpoint, {"vision": tower}, self.grid)
        return Teacher(tower), section.embed_dim, report.lines()

    def loss(self, batch: Batch) -> Tensor:
        """This microbatch's share of the mean negative cosine over masked tokens."""
        assert batch.mask_BN is not None
        target_BNE = self.teacher(batch.image_BCHW)
        predicted_ME = self.towers[0].ddp(batch.image_BCHW, batch.mask_BN)
        return negative_cosine_share(predicted_ME, target_BNE[batch.mask_BN], self.num_global_tokens)

    def step(self, batches: list[Batch], seed_pass: Callable[[int], None]) -> Tensor:
        """See `Task.step`."""
        group: dist.ProcessGroup = self.grid.groups.dp
        here = float(sum(int(batch.mask_BN.sum()) for batch in batches if batch.mask_BN is not None))
        (self.num_global_tokens,) = all_sum([here], self.runtime, group)
        share = local_step(self, self.towers, batches, seed_pass)
        (loss,) = all_sum([share.item()], self.runtime, group)
        return torch.tensor(loss)

    def after_step(self) -> dict[str, float]:
        """Nothing to clamp."""
        return {"masked_tokens": self.num_global_tokens}

    def evaluate(self) -> dict[str, Any]:
        """The cosine behind the mask on the sets of `cfg.eval.retrieval`."""
        examples = Path(self.cfg.run_dir) / "masked.json"
        return evaluate_masked(
            self.student, self.teacher, self.cfg, grid=self.grid, device=self.runtime.device, examples=examples
        )
