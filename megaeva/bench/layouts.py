"""The runs of `megaeva bench layouts`: one recipe on one rank with several seeds, and in every layout of two ranks.

Each is a stage as a loop has them: a job of its own, noted in a ledger, skipped or resumed when the command runs again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from megaeva.config import as_overrides, check_world, diff_from_base, load
from megaeva.config.schema import LaunchSection, LoopConfig, TeacherStageSection
from megaeva.config.topology import sharing_ranks
from megaeva.errors import ConfigError
from megaeva.loop.launch import StageFailedError
from megaeva.loop.ledger import Ledger
from megaeva.loop.stages import Stage
from megaeva.loop.weak_to_strong import check_ledger, run_stage

_NUM_MICROBATCHES = 4


@dataclass(frozen=True)
class Layout:
    """A way to spread the recipe: this many processes, with these keys set on top of it."""

    name: str
    num_processes: int
    set: Mapping[str, object] = field(default_factory=dict)


ONE_RANK = Layout("1_rank", 1)


def two_rank_layouts(global_batch_size: int) -> tuple[Layout, ...]:
    """Every parallelism that two ranks can hold; gradient accumulation, which is its own, on one."""
    tp2 = {"parallel.vision.tp": 2, "parallel.text.tp": 2}
    micro = {"train.micro_batch_size": global_batch_size // _NUM_MICROBATCHES}
    pp2 = {"parallel.vision.pp": 2} | micro
    overlap = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    return (
        Layout("dp2", 2),
        Layout("tp2", 2, tp2),
        Layout("tp2_sp", 2, tp2 | {f"parallel.{tower}.sequence_parallel": True for tower in ("vision", "text")}),
        Layout("pp2", 2, pp2),
        Layout("pp2_vpp2", 2, pp2 | {"parallel.vision.vpp": 2}),
        Layout("vision_tp2_text_tp1", 2, {"parallel.vision.tp": 2}),
        Layout("accumulate4", 1, micro),
        Layout("tp2_recompute", 2, tp2 | {f"parallel.{tower}.recompute": "full" for tower in ("vision", "text")}),
        Layout("pp2_overlap", 2, pp2 | {f"parallel.{key}": True for key in overlap}),
    )


# ------------------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Run:
    """One training job: a layout with a seed.

    Attributes:
        same_samples: whether its steps see the samples of the 1-rank run, so that the two differ by rounding only.
    """

    layout: Layout
    seed: int
    same_samples: bool
    stage: Stage


def plan_runs(recipe: Path, samples: int | None, seeds: Sequence[int], run_dir: Path) -> list[Run]:
    """All runs in the order they are made: one rank with every seed, then each layout.

    A layout with the samples of the 1-rank run is trained with the first seed only. One with several data blocks draws
    other crops in another order, as another seed would, so it is trained with every seed and judged by the mean.

    Args:
        samples: length of a run; None: the recipe's. The warm-up keeps its share.

    Raises:
        ConfigError: the recipe is wrong, has no retrieval set, or does not fit a layout; fewer than two seeds.
    """
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds {','.join(map(str, seeds))} must be at least two different numbers: "
            "layouts are measured against the spread over seeds; e.g. --seeds 0,1,2."
        )
    base = load(recipe)
    if base.task != "contrastive" or not base.eval.retrieval:
        raise ConfigError(
            f"{recipe} (task={base.task}) must be contrastive and name a set under eval.retrieval, whose recall is "
            "compared; use e.g. recipes/demo_teacher.yaml."
        )
    length: dict[str, object] = {}
    if samples is not None:
        warmup_steps = base.optim.warmup_steps * samples // base.train.total_samples
        length = {"train.total_samples": samples, "optim.warmup_steps": warmup_steps}
    runs: list[Run] = []
    for layout in (ONE_RANK, *two_rank_layouts(base.train.global_batch_size)):
        for seed in seeds:
            name = f"{layout.name}/seed_{seed}"
            # Every step is logged: the first loss is of the initial weights.
            own = {"seed": seed, "run_dir": f"{run_dir}/{name}", "train.log_every_steps": 1}
            overrides = as_overrides(length | dict(layout.set) | own)
            cfg = load(recipe, overrides)
            check_world(cfg, layout.num_processes)
            same_samples = layout.num_processes == sharing_ranks(cfg)
            stage = Stage(name, "control", cfg, changes=tuple(diff_from_base(recipe, overrides)))
            runs.append(Run(layout, seed, same_samples, stage))
            if same_samples and layout != ONE_RANK:
                break
    return runs


def train_all(runs: Sequence[Run], run_dir: Path, console: Console) -> Ledger:
    """Makes what is left of the runs and returns their ledger. A layout's failure is printed and the others go on.

    Raises:
        LedgerError: `run_dir` holds runs of another recipe.
        StageFailedError: a 1-rank run failed: there is nothing to compare with.
        StageInterruptedError: Ctrl-C or SIGTERM; the same call again goes on.
    """
    ledger = Ledger(run_dir)
    check_ledger(ledger, [run.stage for run in runs])
    for number, run in enumerate(runs, 1):
        title = f"({number}/{len(runs)}) {run.stage.name}"
        if is_finished(run.stage, ledger):
            console.print(f"{title}: finished earlier")
            continue
        console.rule(title, align="left")
        # A chain without rounds: what a stage needs to know of its loop is where it is and how to start.
        launch = LaunchSection(num_processes=run.layout.num_processes)
        loop = LoopConfig(run_dir=str(run_dir), launch=launch, teacher=TeacherStageSection(), rounds=())
        try:
            run_stage(loop, ledger, run.stage)
        except StageFailedError as error:
            if run.layout == ONE_RANK:
                raise
            console.print(f"error: {error}", markup=False)
    return ledger


def is_finished(stage: Stage, ledger: Ledger) -> bool:
    """Whether a run has all its results; deleting its folder is how one asks for it again."""
    entry = ledger.entries.get(stage.name)
    return entry is not None and entry.status == "finished" and (stage.run_dir / "finished.json").exists()
