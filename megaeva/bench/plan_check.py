"""`megaeva bench plan-check`: the planner's peak memory of a rank beside the tensors that it holds, for 14 small runs.

Measured is what torch's allocator has given out and not got back, from before the model is built, at its highest in the
second of two steps: parameters, gradients, optimizer, activations, buffers, everything that is a tensor. torch counts
it to the byte, in all threads; resident memory also has the interpreter, libraries and what malloc keeps for later. So
small runs tell as much as large ones. The batch is there before, as a loader's is: a microbatch's pixels, of which the
planner counts a copy, are added where the run makes none, in fp32.
"""

import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megaeva.bench.captions import end_tokens
from megaeva.bench.compare import row
from megaeva.bench.step import MegatronStep, example_batch, recipe
from megaeva.checkpoint.weights import LoadReport
from megaeva.config.schema import Config, MaskSection, MIMSection, ModelSection, ParallelSection, TeacherSection
from megaeva.config.topology import data_ranks, grid_axes, microbatches
from megaeva.config.validate import check_world
from megaeva.config.variants import VARIANTS
from megaeva.data.batch import Batch
from megaeva.errors import UserError
from megaeva.model.init import init_weights
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.optim.build import build_optimizer
from megaeva.parallel import runtime
from megaeva.parallel.runtime import Runtime
from megaeva.planning.compare import CPU, tensor_bytes
from megaeva.planning.estimate import plan
from megaeva.planning.meter import allocations, count_in_all_threads
from megaeva.tasks.mim import MIM

MIB = 2**20
LIMIT = 0.05


@dataclass(frozen=True)
class Run:
    """What is measured: a variant's kind of towers at width 128, images of 65 tokens and captions of 32.

    Of task=mim the student is distilled from four layers of its own kind, 26 of 64 patches masked.
    """

    name: str
    variant: str
    ranks: int
    layers: int
    batch: int
    precision: str
    parallel: Mapping[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    task: Literal["contrastive", "mim"] = "contrastive"
    optimizer: Literal["adamw", "lamb"] = "adamw"

    @property
    def teacher(self) -> ModelSection | None:
        """Of a MIM run."""
        model = self.config().model
        vision = model.vision.model_copy(update={"num_layers": 4})
        return model.model_copy(update={"vision": vision}) if self.task == "mim" else None

    def config(self) -> Config:
        """Its recipe."""
        model = ModelSection.model_validate({"variant": self.variant} | VARIANTS[self.variant])
        gated = model.vision.activation == "swiglu"
        vision = {
            "hidden_size": 128, "num_heads": 2, "num_layers": self.layers, "ffn_hidden_size": 336 if gated else 512,
            "patch_size": 8, "image_size": 64,
        }  # fmt: skip
        text = {
            "hidden_size": 128, "num_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "vocab_size": 1024,
            "context_length": 32,
        }  # fmt: skip
        parts = {"vision": model.vision.model_copy(update=vision), "text": model.text.model_copy(update=text)}
        cfg = recipe(model.model_copy(update=parts | {"embed_dim": 256}), self.batch, "fp32", self.optimizer)
        train = {"precision": self.precision, "micro_batch_size": self.micro_batch}
        parallel = ParallelSection.model_validate(self.parallel)
        changes: dict[str, Any] = {"train": cfg.train.model_copy(update=train), "parallel": parallel}
        if self.task == "mim":
            mask = MaskSection(num_masked=26, min_block=4)
            changes |= {"task": "mim", "mim": MIMSection(mask=mask), "teacher": TeacherSection(checkpoint="none")}
        return Config.model_validate(cfg.model_copy(update=changes).model_dump())


def _both(**axes: Any) -> dict[str, Any]:
    return {"vision": axes, "text": axes}


RUNS = (
    Run("EVA-02 B", "EVA02-CLIP-B-16", 1, 6, 16, "bf16"),
    Run("EVA-02 L", "EVA02-CLIP-L-14", 1, 6, 16, "fp32"),
    Run("EVA-02 L, full recompute", "EVA02-CLIP-L-14", 1, 8, 32, "bf16", _both(recompute="full")),
    Run("OpenAI, tp 2", "ViT-B-32-quickgelu", 2, 6, 32, "fp32", _both(tp=2)),
    Run(
        "8B, tp 2 sp, selective", "EVA-CLIP-8B", 2, 6, 32, "bf16",
        _both(tp=2, sequence_parallel=True, recompute="selective"),
    ),
    Run("bigE (post-norm), pp 2", "EVA02-CLIP-bigE-14", 2, 8, 32, "fp32", {"vision": {"pp": 2}}, 4),
    Run(
        "EVA-02 L, pp 2 vpp 2, full recompute", "EVA02-CLIP-L-14", 2, 8, 32, "bf16",
        {"vision": {"pp": 2, "vpp": 2, "recompute": "full"}}, 4,
    ),
    Run("OpenAI, dp 2, distributed optimizer", "ViT-B-32-quickgelu", 2, 6, 32, "bf16", {"distributed_optimizer": True}),
    Run("bigE, dp 2, accumulation", "EVA02-CLIP-bigE-14", 2, 6, 32, "fp32", {"distributed_optimizer": False}, 4),
    Run(
        "EVA-02 L, tp 2 sp dp 2, two layers recomputed", "EVA02-CLIP-L-14", 4, 6, 32, "bf16",
        _both(tp=2, sequence_parallel=True, recompute=2),
    ),
    Run("EVA-02 B with a teacher", "EVA02-CLIP-B-16", 1, 6, 32, "bf16", task="mim"),
    Run(
        "8B with a teacher, tp 2 sp, teacher whole", "EVA-CLIP-8B", 2, 6, 32, "bf16",
        {"vision": {"tp": 2, "sequence_parallel": True}}, 8, task="mim",
    ),
    Run(
        "EVA-01 g with a teacher, pp 2", "EVA01-CLIP-g-14", 2, 8, 32, "fp32", {"vision": {"pp": 2}}, 4, task="mim",
    ),
    Run("EVA-02 B, LAMB, dp 2", "EVA02-CLIP-B-16", 2, 6, 32, "bf16", optimizer="lamb"),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Of the rank that is furthest off: bytes as planned and as measured."""

    run: Run
    rank: int
    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Relative, above 0 where too much was planned."""
        return self.planned / self.measured - 1


def check(run: Run) -> Figure:
    """Makes the run, each rank in a fresh process.

    Raises:
        UserError: a rank failed.
    """
    return furthest(run, _measure_ranks(run))


def furthest(run: Run, measured: Sequence[int]) -> Figure:
    """The plan beside what each rank measured."""
    cfg = run.config()
    check_world(cfg, run.ranks)
    stages = plan(cfg, run.ranks, CPU, run.teacher).stages
    figures = [Figure(run, rank, tensor_bytes(stages[_stage(cfg, rank)]), peak) for rank, peak in enumerate(measured)]
    return max(figures, key=lambda figure: abs(figure.error))


def check_lines(figures: list[Figure]) -> Iterator[str]:
    """The rows of benchmarks/log.md, and a sentence."""
    for one in figures:
        run = one.run
        yield row(
            f"{run.name}, {run.precision}", str(run.ranks), f"{one.planned / MIB:.1f}", f"{one.measured / MIB:.1f}",
            f"{100 * one.error:+.1f} %",
        )  # fmt: skip
    worst = max(figures, key=lambda one: abs(one.error))
    yield (
        f"{len(figures)} runs, of each the rank that is furthest off: at most {100 * abs(worst.error):.1f} % "
        f"({worst.run.name}); the limit is {100 * LIMIT:g} %"
    )


def within_limit(figures: list[Figure]) -> bool:
    """Whether all are."""
    return all(abs(one.error) <= LIMIT for one in figures)


def _measure_ranks(run: Run) -> list[int]:
    # Forked by a process that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megaeva.bench.plan_check"])
    with tempfile.TemporaryDirectory(prefix="megaeva-") as folder:
        ranks = [context.Process(target=_measure, args=(rank, run, folder)) for rank in range(run.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if codes := [process.exitcode for process in ranks if process.exitcode]:
            raise UserError(
                f"a rank of {run.name} ended with exit code {codes[0]}, all must end by themselves (-9: the system ran "
                "out of memory); see above, free memory and run the same command again."
            )
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(run.ranks)]


def _measure(rank: int, run: Run, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", run.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=run.ranks)
    this = runtime.start("cpu")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(peak_bytes(run, this)), encoding="utf-8")
    dist.barrier()
    runtime.stop()


def peak_bytes(run: Run, this: Runtime) -> int:
    """Of this rank's tensors in the second step, pixels included; all ranks call it, once in a process: a second batch
    would be counted."""
    cfg = run.config()
    blocks = data_ranks(grid_axes(cfg)["data"], run.ranks)
    batch = example_batch(cfg.model, end_tokens(cfg.model.text, run.batch)[0])
    if cfg.mim is not None:
        order = torch.rand(run.batch, cfg.model.vision.num_patches, generator=torch.Generator().manual_seed(2))
        mask_BN = order.argsort(1) < cfg.mim.mask.num_masked
        batch = replace(batch, token_BL=None, mask_BN=mask_BN)
    own = batch.split(len(batch) // blocks)[this.rank * blocks // run.ranks]
    count_in_all_threads(True)
    step = MegatronStep(cfg, this, own) if run.teacher is None else _DistilStep(cfg, this, own, run.teacher)
    step()
    with allocations() as found:
        step()
    peak = found.before + found.peak
    if run.precision == "fp32" and _stage(cfg, this.rank) == 0:
        size, _ = microbatches(cfg, cfg.parallel.vision, run.ranks)
        peak += 4 * 3 * cfg.model.vision.image_size**2 * size
    return peak


class _MIM(MIM):
    """With a fresh teacher in place of a checkpoint's."""

    def __init__(self, cfg: Config, this: Runtime, teacher: ModelSection) -> None:
        self._section = teacher
        super().__init__(cfg, this)

    def _load_teacher(self, cfg: Config) -> tuple[Teacher, int, LoadReport]:
        grid, section = self.grids["teacher"], self._section
        precision = cfg.train.parameter_precision
        tower = VisionTower(section.vision, section.embed_dim, grid=grid, precision=precision)
        init_weights(tower, seed=1, task="contrastive", grid=grid)
        return Teacher(tower), section.embed_dim, LoadReport(Path("none"), "fresh", (), (), (), ())


class _DistilStep(MegatronStep):
    def __init__(self, cfg: Config, this: Runtime, batch: Batch, teacher: ModelSection) -> None:
        self.cfg, self.batch, self.num_steps = cfg, batch, 0
        self.task = _MIM(cfg, this, teacher)  # type: ignore[assignment]  # a step asks of it what it asks of a Contrastive
        self.optimizer, self.learning_rate = build_optimizer(self.task.towers, cfg)


def _stage(cfg: Config, rank: int) -> int:
    axes = cfg.parallel.vision
    return rank // axes.tp % axes.pp
