"""Masked feature distillation: the student sees masked patches, the frozen teacher the whole crop."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.checkpoint.convert.start import Weights
from megaeva.checkpoint.weights import LoadReport, load_weights
from megaeva.config.schema import Config
from megaeva.config.topology import grid_axes
from megaeva.config.validate import check_teacher
from megaeva.data.batch import Batch
from megaeva.errors import ConfigError
from megaeva.eval.masked import evaluate_masked
from megaeva.losses.feature_distill import negative_cosine_share
from megaeva.model.init import init_weights
from megaeva.model.mim_student import MIMStudent
from megaeva.model.recompute import set_recompute
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel import watch
from megaeva.parallel.collectives import all_gather_rows, all_sum
from megaeva.parallel.grid import build_grids
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.schedule import Part, local_step
from megaeva.parallel.wrap import Tower, wrap
from megaeva.tasks.share import own_microbatches, share_number
from megaeva.tasks.start import opened_start, opened_teacher


class MIM:
    """See `megaeva.tasks.base.Task`."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        assert cfg.mim is not None, "config.validate requires it for this task"
        self.cfg, self.runtime = cfg, runtime
        self.grids = build_grids(grid_axes(cfg), runtime)
        self.grid = self.grids["data"]
        watch.place(watch.place_of("student", self.grids["student"], cfg.model.vision.num_layers))
        self.teacher, teacher_dim, report = self._load_teacher(cfg)
        self.student = MIMStudent(
            cfg.model.vision,
            teacher_dim,
            grid=self.grids["student"],
            precision=cfg.train.parameter_precision,
            layer_spec=runtime.layer_spec,
            device=runtime.device,
            stop_grad_patch_embed=cfg.mim.stop_grad_patch_embed,
            fp8=cfg.train.fp8_in_use,
        )
        set_recompute(self.student.vision, cfg.parallel.vision.recompute)
        init_weights(self.student, seed=cfg.seed, task="mim", grid=self.grids["student"])
        self.start_reports = [report]
        if cfg.init.vision:
            vision = {"vision": (self.student.vision, self.grids["student"])}
            with opened_start(cfg.init.vision, cfg, ("vision",)) as start:
                report = load_weights(start, vision, skip=("vision.head",), resize=cfg.init.resize)
            self.start_reports.append(report)
        self.towers: Sequence[Tower] = [wrap("student", self.student, self.grids["student"], cfg.parallel)]
        self.teacher_dim = teacher_dim
        self.num_global_tokens = 0.0

    def _load_teacher(self, cfg: Config) -> tuple[Teacher, int, LoadReport]:
        assert cfg.teacher is not None
        with closing(opened_teacher(cfg.teacher.checkpoint)) as weights:
            return self._load_opened_teacher(cfg, weights)

    def _load_opened_teacher(self, cfg: Config, weights: Weights) -> tuple[Teacher, int, LoadReport]:
        assert cfg.teacher is not None
        section = weights.contents.model
        check_teacher(cfg, section.vision)
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
            grid=self.grids["teacher"],
            precision=cfg.train.parameter_precision,
            layer_spec=self.runtime.layer_spec,
            device=self.runtime.device,
        )
        report = load_weights(weights, {"vision": (tower, self.grids["teacher"])})
        return Teacher(tower), section.embed_dim, report

    def step(self, batch: Batch, seed_pass: Callable[[int], None], loss_scale: float = 1.0) -> Tensor:
        """See `Task.step`."""
        assert batch.mask_BN is not None
        (student,) = self.towers
        grid = student.grid
        target_ME = self.targets(batch)
        batches = own_microbatches(batch, grid, self.grid, self.cfg)
        counts = [int(part.mask_BN.sum()) for part in batches if part.mask_BN is not None]
        first_of_block = len(batches) * share_number(grid, self.grid)
        before = int(batch.mask_BN[: len(batches[0]) * first_of_block].sum())
        own_targets = target_ME[before : before + sum(counts)].split(counts)
        (self.num_global_tokens,) = all_sum([float(sum(counts))], self.runtime, grid.groups.dp)
        part = Part(
            student,
            batches,
            self._student_forward,
            num_stage_tokens=self.student.vision.num_stage_tokens(None),
            embed_dim=self.teacher_dim,
            first_index=len(batches) * grid.dp_rank,
        )
        loss_share = local_step(
            part,
            lambda index, predicted_ME: negative_cosine_share(predicted_ME, own_targets[index], self.num_global_tokens),
            self.towers,
            seed_pass,
            loss_scale,
        )
        (loss,) = all_sum([loss_share.item()], self.runtime, grid.groups.dp)
        return torch.tensor(loss)

    def _student_forward(self, part: Batch, hidden: Tensor | None, chunk: int) -> Tensor:
        assert part.mask_BN is not None
        device = self.runtime.device
        # Only the first stage looks at images, and only one microbatch of them is on the device at a time.
        image_BCHW = part.image_BCHW.to(device, non_blocking=True) if hidden is None else None
        mask_BN = part.mask_BN.to(device, non_blocking=True)
        predicted_ME: Tensor = self.towers[0].ddp(image_BCHW, mask_BN, hidden=hidden, chunk=chunk)
        return predicted_ME

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's features [M, E] behind the masks of a data block's samples, in row-major order of its mask.

        Each image goes through the teacher once: its data ranks share out the block, which all of its ranks then know.
        All ranks of the data block call it.
        """
        assert batch.mask_BN is not None
        grid = self.grids["teacher"]
        watch.at("the teacher's pass")
        parts = own_microbatches(batch, grid, self.grid, self.cfg)
        on_device = (part.to(self.runtime.device) for part in parts)
        target_ME = torch.cat([self.teacher(part.image_BCHW)[part.mask_BN] for part in on_device])
        if grid.dp_size == self.grid.dp_size:
            return target_ME
        # Each of the ranks that hold the same rows gives its part of them; counts follow from the masks, known to all.
        counts = [int(mask_BN.sum()) for mask_BN in batch.mask_BN.split(sum(map(len, parts)))]
        sizes = [len(rows) for count in counts for rows in torch.empty(count, 0).tensor_split(grid.tp_size)]
        own = target_ME.tensor_split(grid.tp_size)[grid.tp_rank]
        padded = functional.pad(own, (0, 0, 0, max(sizes) - len(own)))
        gathered = all_gather_rows(padded, self.grid.groups.tp).split(max(sizes))
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    def after_step(self) -> dict[str, float]:
        """Nothing to clamp."""
        return {"masked_tokens": self.num_global_tokens}

    def evaluate(self) -> dict[str, Any]:
        """The cosine behind the mask on the sets of `cfg.eval.retrieval`."""
        examples = Path(self.cfg.run_dir) / "masked.json"
        return evaluate_masked(
            self.student, self.teacher, self.cfg, grid=self.grid, device=self.runtime.device, examples=examples
        )
