"""`megaeva bench sweep`: layouts, sizes, precisions and numbers of ranks of one recipe, a few steps of each as a job.

OUT/rows.jsonl has one row a run; a run whose row is there is not made again, unless its recipe is another by now.
OUT/tables.md and OUT/sweep.svg are drawn from the rows. OUT/runs/NAME keeps a run's log, metrics and trace, no
checkpoint.
"""

import difflib
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from megaeva.bench.sweep_nodes import Machines
from megaeva.checkpoint.layout import read_model_section
from megaeva.config import check_world, dump, load
from megaeva.config.schema import AxesSection, Config, EvalSection, TrainSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError
from megaeva.loop.launch import StageFailedError
from megaeva.loop.ledger import recipe_hash
from megaeva.observability.metrics import read_metrics
from megaeva.observability.record import git_commit
from megaeva.planning import plan
from megaeva.planning.gpus import find_gpu

Scaling = Literal["strong", "weak", "both"]

_WARM_UP, _TRACED = 3, 2  # steps before those that are timed, and after them
_TOKEN = re.compile(r"(dp|sp|zero|recompute|(?:tp|text|pp|vpp|mb)\d+)")
_AGAIN = "run the same command again: it makes this run anew, and what is left."
_PRECISIONS = get_args(TrainSection.model_fields["precision"].annotation)
_UNDONE = ("tp", "pp", "vpp", "layers_per_stage", "sequence_parallel")
_IDENTITY = ("recipe", "overrides", "size", "precision", "layout", "ranks", "nodes", "global_batch_size", "steps")
_NOTHING_BESIDE = ("save.enabled=false", "optim.warmup_steps=0")


@dataclass(frozen=True)
class Run:
    """One job of a sweep.

    Attributes:
        cfg: its whole recipe; nothing is evaluated.
        identity: what its row is found by.
    """

    name: str
    ranks: int
    cfg: Config
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of all that its recipe says now, whatever --out is; a file may say something else under the same name."""
        return recipe_hash(self.cfg.model_copy(update={"run_dir": ""}))[:12]


class _Row(BaseModel):
    """What is read of a row; it has more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    recipe: str
    overrides: list[str]
    size: str
    precision: str
    layout: str
    ranks: PositiveInt
    nodes: PositiveInt
    global_batch_size: PositiveInt
    steps: PositiveInt
    digest: str | None = None
    commit: str | None = None
    samples_per_second: PositiveFloat
    mfu: float | None
    memory_gib: float
    data_wait_share: float
    communication_share: float
    trace_shares: dict[str, float]


def layout_overrides(layout: str, cfg: Config) -> list[str]:
    """A layout's keys, which go on top of the recipe. What the recipe has along an axis is undone, not kept.

    Args:
        layout: words joined by "_": dp (all axes 1), tpN (both towers), textN (text tower), ppN, vppN, sp (sequence
            parallel), zero (distributed optimizer), mbN (micro batch), recompute (full); e.g. tp2_pp2_sp.

    Raises:
        ConfigError: a word that is none of these.
    """
    towers = ["vision", "text"] if cfg.task == "contrastive" else ["vision"]
    found: dict[str, object] = {}
    for tower, key in product(towers, _UNDONE):
        default = AxesSection.model_fields[key].default
        if getattr(getattr(cfg.parallel, tower), key) != default:
            found[f"parallel.{tower}.{key}"] = json.dumps(default)
    for word in layout.split("_"):
        if not _TOKEN.fullmatch(word):
            raise ConfigError(
                f"--layouts {layout}: {word!r} is no layout; its words must be dp, tpN, textN, ppN, vppN, sp, zero, "
                "mbN or recompute, joined by _; e.g. --layouts dp,tp2,tp2_pp2_sp."
            )
        number = word.lstrip("abcdefghijklmnopqrstuvwxyz")
        match word.removesuffix(number):
            case "tp":
                found |= {f"parallel.{tower}.tp": number for tower in towers}
            case "text":
                found["parallel.text.tp"] = number
            case "pp" | "vpp" as axis:
                found[f"parallel.vision.{axis}"] = number
            case "sp":
                found |= {f"parallel.{tower}.sequence_parallel": "true" for tower in towers}
            case "recompute":
                found |= {f"parallel.{tower}.recompute": "full" for tower in towers}
            case "zero":
                found["parallel.distributed_optimizer"] = "true"
            case "mb":
                found["train.micro_batch_size"] = number
    return [f"{key}={value}" for key, value in found.items()]


def plan_runs(
    recipe: Path,
    overrides: Sequence[str],
    *,
    ranks: Sequence[int],
    layouts: Sequence[str],
    sizes: Sequence[str],
    precisions: Sequence[str],
    scaling: Scaling,
    steps: int,
    machines: Machines,
    out: Path,
    say: Callable[[str], None],
) -> list[Run]:
    """The jobs of a sweep, small ones first; combinations that cannot be are said and left out.

    Args:
        sizes: names for model.variant; empty: the recipe's model.
        precisions: empty: the recipe's.
        scaling: strong keeps the recipe's global batch at all ranks, weak its share of the first number of ranks.
        steps: that are timed.

    Raises:
        ConfigError: the recipe itself, a name of a layout, size or precision, or not one combination is right; or there
            are not the machines for a number of ranks.
    """
    base = load(recipe, overrides)
    nodes = {number: machines.num_nodes(number) for number in ranks}
    for size in sizes:
        if size not in VARIANTS:
            near = difflib.get_close_matches(size, VARIANTS, n=3) or VARIANTS
            raise ConfigError(f"--sizes {size} must be a known variant; did you mean {' or '.join(near)}?")
    for precision in precisions:
        if precision not in _PRECISIONS:
            raise ConfigError(f"--precisions {precision} must be {', '.join(_PRECISIONS)}; use some of them.")
    runs: list[Run] = []
    for size, precision, layout, number in product(
        dict.fromkeys(sizes or [""]),
        dict.fromkeys(precisions or [base.train.precision]),
        dict.fromkeys(layouts),
        sorted(nodes),
    ):
        batch = base.train.global_batch_size
        weak = batch * number // min(ranks)
        for global_batch in sorted({"strong": {batch}, "weak": {weak}, "both": {batch, weak}}[scaling]):
            identity = {
                "recipe": str(recipe), "overrides": list(overrides), "size": size or base.model.variant or "recipe",
                "precision": precision, "layout": layout, "ranks": number, "nodes": nodes[number],
                "global_batch_size": global_batch, "steps": steps,
            }  # fmt: skip
            name = f"{identity['size']}_{precision}_{layout}_{number}_ranks_batch_{global_batch}"
            total = _WARM_UP + steps + _TRACED
            settings = [
                *overrides,
                *([f"model.variant={size}"] if size else []),
                *layout_overrides(layout, base),
                *_NOTHING_BESIDE,
                f"train.precision={precision}",
                f"train.global_batch_size={global_batch}",
                f"train.total_samples={global_batch * total}",
                "train.log_every_steps=1",
                f"train.profile.first_step={_WARM_UP + steps}",
                f"train.profile.num_steps={_TRACED}",
                "train.profile.ranks=[0]",
                f"run_dir={out / 'runs' / name}",
            ]
            try:
                cfg = load(recipe, settings).model_copy(update={"eval": EvalSection()})
                check_world(cfg, number)
            except ConfigError as error:
                say(f"left out: {name}: {error}")
                continue
            runs.append(Run(name, number, cfg, identity))
    if not runs:
        raise ConfigError(
            f"no combination of --ranks {','.join(map(str, ranks))} and --layouts {','.join(layouts)} fits {recipe}; "
            "at least one must; see the reasons above."
        )
    return runs


def make_runs(
    runs: Sequence[Run], machines: Machines, out: Path, peak_tflops: float | None, say: Callable[[str], None]
) -> list[str]:
    """Makes the runs that have no row of their recipe yet, and returns the names of those that failed.

    One that fails or hangs is said and has no row, so the next sweep tries it again.

    Args:
        peak_tflops: of one rank, for MFU; None: the data sheet's of a GPU that the planner knows, and of a CPU what its
            torch.mm reaches with a rank's threads, measured here.

    Raises:
        StageInterruptedError: this process got SIGINT or SIGTERM; the run under way was ended and has no row.
    """
    rows = {json.dumps(_identity(row)): row for row in read_rows(out)}
    here = git_commit()
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        title = f"({number}/{len(runs)}) {run.name}"
        if (old := rows.get(json.dumps(run.identity))) and old.get("digest") == run.digest:
            made_by = f", of commit {old.get('commit')}; this is {here}; delete the line in rows.jsonl to measure again"
            say(f"{title}: has its row{'' if old.get('commit') == here else made_by}")
            continue
        say(f"{title}: its row is of another recipe, made again" if old else title)
        run_dir = Path(run.cfg.run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        dump(run.cfg, run_dir / "recipe.yaml")
        patience = 60 * run.cfg.train.timeout_minutes
        try:
            machines.start(
                run_dir / "recipe.yaml", run.ranks, number, stage=run.name, again=_AGAIN, patience_seconds=patience
            )
        except StageFailedError as error:
            say(f"{title}: failed, no row: {error}")
            failed.append(run.name)
            continue
        figures = measure(run)
        peak, source = (peak_tflops, "given") if peak_tflops else _peak(run, figures)
        if peak is None:
            say(f"{title}: no MFU, the peak of {source} is not known; --peak-tflops gives it")
        mfu = figures["model_flops"] / (figures["step_seconds"] * run.ranks * peak * 1e12) if peak else None
        row = run.identity | {"digest": run.digest} | figures
        row |= {"mfu": mfu, "peak_tflops": peak, "peak_from": source if peak else None}
        _write_row(out, row)
        say(f"{title}: {row['samples_per_second']:.4g} samples/s")
    return failed


def measure(run: Run) -> dict[str, Any]:
    """The figures of a finished run, read from its folder: of the timed steps, and of the traced ones after them.

    `model_flops` are the model's own of a step (megaeva.planning), of which MFU is made; `memory_gib` and the shares of
    the trace are rank 0's.
    """
    from megaeva.observability.profile import read_trace, shares

    run_dir, steps = Path(run.cfg.run_dir), run.identity["steps"]
    lines = {int(line["step"]): line for line in read_metrics(run_dir)}
    first, last = _WARM_UP, _WARM_UP + steps
    seconds = (lines[last]["wall_time"] - lines[first]["wall_time"]) / steps
    timed = [lines[step] for step in range(first + 1, last + 1)]
    weights = [1 / line["samples_per_second"] for line in timed]
    waited = sum(line["data_wait_share"] * weight for line, weight in zip(timed, weights, strict=True))
    (trace,) = (run_dir / "profile").glob("rank_0_*.json.gz")
    milliseconds = shares(read_trace(trace))
    whole = sum(milliseconds.values())
    teacher = run.cfg.teacher
    model = read_model_section(teacher.checkpoint) if teacher else None
    # The kind of GPU is of no matter to the number of operations.
    flops = plan(run.cfg, run.ranks, find_gpu("a100-80"), model).phases[0].model_flops
    made_with = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    return {
        "samples_per_second": run.cfg.train.global_batch_size / seconds,
        "step_seconds": seconds,
        "model_flops": flops,
        "memory_gib": max(line["memory_gib"] for line in timed),
        "data_wait_share": waited / sum(weights),
        "communication_share": milliseconds["communication"] / whole,
        "trace_shares": {part: ms / whole for part, ms in milliseconds.items()},
        "commit": made_with["git_commit"],
        "versions": made_with["packages"],
        "hardware": made_with["machine"],
        "threads": made_with["threads"],
        "command": f"megaeva bench sweep {run.identity['recipe']}, run {run.name}",
    }


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All rows of a sweep; a line cut off by a kill is left out.

    Raises:
        ConfigError: a line of something else.
    """
    path = out / "rows.jsonl"
    if not path.exists():
        return []
    from megaeva.observability.profile import PARTS

    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) or not line.strip():
                continue
            row = None
        try:
            if not _Row.model_validate(row).trace_shares.keys() >= {*PARTS}:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{path}, line {number} is no row of a sweep; every line must be one; remove that line, or choose "
                "another --out."
            ) from None
        rows.append(row)
    return rows


def fresh_rows(out: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All rows of a sweep but those of `runs` that are of another recipe: in one table they would pass for one."""
    digests = {json.dumps(run.identity): run.digest for run in runs}
    return [
        row for row in read_rows(out) if row.get("digest") == digests.get(json.dumps(_identity(row)), row.get("digest"))
    ]


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """The folder `out`, for this process: two sweeps would delete one another's runs.

    On a file system without locks nothing is held.

    Raises:
        ConfigError: another has it, or it cannot be written.
    """
    try:
        lock = os.open(out / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)  # NFS locks no file opened for reading
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror}); it must be a folder that can be; choose another."
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {out} is in use by another sweep; each must have a folder of its own; wait for that one, or "
                "choose another."
            ) from None
        except OSError:  # e.g. Lustre mounted without flock
            pass
        yield
    finally:
        os.close(lock)


def _write_row(out: Path, row: Mapping[str, Any]) -> None:
    """In place of the run's old one; a kill leaves all rows or, beside them, the new one too."""
    rows = [one for one in read_rows(out) if _identity(one) != _identity(row)]
    temporary = out / "rows.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in [*rows, row])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out / "rows.jsonl")


def _identity(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _IDENTITY}


def _peak(run: Run, figures: Mapping[str, Any]) -> tuple[float | None, str]:
    """TFLOP/s of one rank, and of what; fp8 counts against bf16's, as in the planner."""
    from megaeva.planning.compare import gpu_of_chip

    precision: Literal["fp32", "bf16"] = "fp32" if run.cfg.train.precision == "fp32" else "bf16"
    if name := figures["hardware"]["gpu"]:
        gpu, is_known = gpu_of_chip(name)
        return (gpu.peak_tflops[precision], f"data sheet of {gpu.name}") if is_known else (None, name)
    threads = int(figures["threads"] or os.cpu_count() or 1)
    return _measured_ceiling(precision, threads), f"torch.mm here, threads of a rank: {threads}"


@functools.cache
def _measured_ceiling(precision: Literal["fp32", "bf16"], threads: int) -> float:
    """TFLOP/s of torch.mm on this CPU."""
    import torch

    from megaeva.bench.matrix_work import ceiling

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return ceiling({"fp32": torch.float32, "bf16": torch.bfloat16}[precision], torch.device("cpu")) / 1e12
    finally:
        torch.set_num_threads(before)
