"""What `megaeva bench` runs: options are checked before torch is loaded, then what was measured is printed."""

import difflib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import psutil

from megaeva.config.schema import ModelSection
from megaeva.config.variants import OPEN_CLIP_NAMES, VARIANTS
from megaeva.errors import ConfigError, UserError


def run_step(
    model: str,
    batch: int,
    precision: Literal["fp32", "bf16"],
    peer: Literal["open_clip", "plain", "padded", "none"],
    part: Literal["both", "vision", "text"],
    rounds: int,
    threads: int | None,
) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        UserError: an unknown model, a peer that the model or the part does not have or that is not installed.
    """
    section = find_model(model)
    _check_step(section, peer, part)
    import torch

    from megaeva.bench.step import benchmark_step

    if threads:
        torch.set_num_threads(threads)
    command = (
        f"megaeva bench step --peer {peer} --model {model} --batch {batch} --precision {precision} --part {part} "
        f"--rounds {rounds} --threads {torch.get_num_threads()}"
    )
    yield command
    times = benchmark_step(section, batch_size=batch, precision=precision, peer=peer, part=part, num_rounds=rounds)
    yield from times.report(command)


def run_profile(
    model: str,
    batch: int,
    precision: Literal["fp32", "bf16"],
    part: Literal["both", "vision", "text"],
    optimizer: Literal["adamw", "lamb"],
    rounds: int,
    threads: int | None,
) -> Iterator[str]:
    """Yields lines to print: the shares of a step's parts, and their row for benchmarks/log.md.

    Raises:
        UserError: an unknown model.
    """
    section = find_model(model)
    import torch

    from megaeva.bench.step_profile import profile_step

    if threads:
        torch.set_num_threads(threads)
    command = (
        f"megaeva bench step --profile --model {model} --batch {batch} --precision {precision} --part {part} "
        f"--optimizer {optimizer} --rounds {rounds} --threads {torch.get_num_threads()}"
    )
    yield command
    profile = profile_step(
        section, batch_size=batch, precision=precision, part=part, optimizer=optimizer, num_rounds=rounds
    )
    yield from profile.report(command)


def run_data(model: str, batch: int, peer: Literal["webdataset"], workers: int, rounds: int) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        UserError: an unknown model, or a package that the benchmark needs is not installed.
    """
    section = find_model(model)
    require_open_clip(f"--peer {peer}")
    from megaeva.bench.data import benchmark_data

    command = f"megaeva bench data --peer {peer} --model {model} --batch {batch} --workers {workers} --rounds {rounds}"
    yield command
    yield from benchmark_data(section, batch_size=batch, num_workers=workers, num_rounds=rounds).report(command)


def run_loss(
    batches: Sequence[int],
    dim: int,
    precision: Literal["fp32", "bf16"],
    peer: Literal["open_clip", "none"],
    ranks: int,
    rounds: int,
    threads: int | None,
) -> Iterator[str]:
    """Yields lines to print: what was measured, and its rows for benchmarks/log.md.

    Raises:
        UserError: a batch that the ranks cannot share, or a peer that is not installed or would not fit in memory.
    """
    _check_loss(batches, peer, ranks)
    import torch

    from megaeva.bench import loss

    if threads or ranks > 1:
        torch.set_num_threads(threads or max(1, torch.get_num_threads() // ranks))
    sizes = " ".join(f"--batch {batch}" for batch in batches)
    command = (
        f"megaeva bench loss {sizes} --dim {dim} --precision {precision} --peer {peer} --ranks {ranks} "
        f"--rounds {rounds} --threads {torch.get_num_threads()}"
    )
    yield command
    if ranks > 1:
        from megaeva.bench import loss_ranks

        for batch in batches:
            yield f"{ranks} ranks, together {loss.describe(batch, dim)} each"
            job = loss_ranks.RanksJob(
                ranks, batch, dim, precision, peer == "open_clip", rounds, torch.get_num_threads()
            )
            yield from loss_ranks.benchmark_ranks(job).report(command)
        return
    if peer == "open_clip":
        for batch in batches:
            yield loss.describe(batch, dim)
            yield from loss.benchmark_loss(batch, dim, precision=precision, num_rounds=rounds).report(command)
    else:
        yield from loss.size_lines(batches, dim, precision=precision, num_rounds=rounds, command=command)
    if precision == "fp32":
        yield from loss.accuracy_lines(batches[0], dim)


def run_checkpoint(
    model: str, batch: int, precision: Literal["fp32", "bf16"], rounds: int, threads: int | None, folder: Path
) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        UserError: an unknown model, or a disk that does not hold its checkpoints.
    """
    section = find_model(model)
    import torch

    from megaeva.bench.checkpoint import benchmark_checkpoint

    if threads:
        torch.set_num_threads(threads)
    command = (
        f"megaeva bench checkpoint --model {model} --batch {batch} --precision {precision} --rounds {rounds} "
        f"--threads {torch.get_num_threads()}"
    )
    yield command
    timed = benchmark_checkpoint(section, batch_size=batch, precision=precision, num_rounds=rounds, folder=folder)
    yield from timed.report(command)


def run_convert(model: str, rounds: int, folder: Path) -> Iterator[str]:
    """Yields lines to print: what was measured, and its rows for benchmarks/log.md.

    Raises:
        UserError: an unknown model, one that EVA's layout cannot hold, or a disk that is too small.
    """
    section = find_model(model)
    from megaeva.bench.convert import benchmark_convert, plan_lines

    command = f"megaeva bench convert --model {model} --rounds {rounds}"
    yield command
    timed = []
    for one in benchmark_convert(section, num_rounds=rounds, folder=folder):
        timed.append(one)
        yield from one.report(command)
    yield from plan_lines(timed, section)


def run_layouts(recipe: Path, samples: int | None, seeds: Sequence[int], run_dir: Path) -> bool:
    """Makes what is left of the runs, prints table, rows for benchmarks/log.md and verdict, writes layouts.json.

    Returns whether every layout trains to within the seeds' noise.

    Raises:
        UserError: a mistake in the options or recipe, or a run that nothing can be said without.
    """
    from rich.console import Console

    from megaeva.bench.layout_table import compare, print_comparison, write_json
    from megaeva.bench.layouts import plan_runs, train_all

    console = Console(highlight=False)
    runs = plan_runs(recipe, samples, seeds, run_dir)
    comparison = compare(runs, train_all(runs, run_dir, console))
    write_json(comparison, recipe, run_dir / "layouts.json")
    print_comparison(comparison, console)
    return not any(layout.fault for layout in comparison.layouts)


def run_fp8(recipe: Path, precisions: Sequence[str], seeds: Sequence[int], run_dir: Path, out: Path, jobs: int) -> bool:
    """Makes what is left of the chains, prints rows for benchmarks/log.md, writes fp8.json and fp8_curves.svg.

    Returns whether every precision's recall is as near to bf16's as it must be.

    Raises:
        UserError: a mistake in the options or recipe, or a chain that failed.
    """
    from megaeva.bench import fp8

    chains = fp8.plan_chains(recipe, precisions, seeds, run_dir)
    fp8.run_chains(chains, jobs)
    results = fp8.measured(chains)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fp8.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fp8.draw_curves(results, out / "fp8_curves.svg")
    command = f"megaeva bench fp8 --precisions {','.join(precisions)} --seeds {','.join(map(str, seeds))}"
    for line in fp8.table_lines(results, command):
        print(line)
    return fp8.within_limit(results)


def run_sweep(
    recipe: Path,
    overrides: Sequence[str],
    *,
    ranks: Sequence[int],
    layouts: Sequence[str],
    sizes: Sequence[str],
    precisions: Sequence[str],
    scaling: Literal["strong", "weak", "both"],
    steps: int,
    peak_tflops: float | None,
    out: Path,
) -> bool:
    """Makes what is left of the runs, prints their tables, writes rows.jsonl, tables.md and sweep.svg into `out`.

    Returns whether none of them failed.

    Raises:
        UserError: a mistake in the options or recipe, or Ctrl-C.
    """
    from megaeva.bench import sweep, sweep_nodes, sweep_tables
    from megaeva.config import load
    from megaeva.loop.node import count_gpus

    machines = sweep_nodes.find_machines(load(recipe, overrides), os.environ, count_gpus())
    runs = sweep.plan_runs(
        recipe, overrides, ranks=ranks, layouts=layouts, sizes=sizes, precisions=precisions, scaling=scaling,
        steps=steps, machines=machines, out=out, say=print,
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be made ({error.strerror}); it must be a folder; choose another."
        ) from None
    failed: list[str] = []
    with sweep.alone_in(out):
        try:
            failed = sweep.make_runs(runs, machines, out, peak_tflops, print)
        finally:  # also after Ctrl-C: what is there is shown
            if rows := sweep.fresh_rows(out, runs):
                lines = sweep_tables.table_lines(rows)
                (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
                sweep_tables.draw(rows, out / "sweep.svg")
                print("\n".join(lines))
    for name in failed:
        print(f"failed, no row: {name} (log: {out / 'runs' / name / 'train.log'})")
    return not failed


def run_plan_check() -> bool:
    """Makes the runs, prints their rows for benchmarks/log.md. Returns whether the plans of all are within the limit.

    Raises:
        UserError: a rank failed.
    """
    from megaeva.bench import plan_check

    figures = [plan_check.check(run) for run in plan_check.RUNS]
    for line in plan_check.check_lines(figures):
        print(line)
    return plan_check.within_limit(figures)


def find_model(name: str) -> ModelSection:
    """The published model of that name, upstream's or open_clip's.

    Raises:
        ConfigError: there is none.
    """
    upstream = {theirs: ours for ours, theirs in OPEN_CLIP_NAMES.items()}
    variant = upstream.get(name, name)
    if variant not in VARIANTS:
        near = difflib.get_close_matches(name, [*VARIANTS, *upstream], n=3) or list(VARIANTS)
        raise ConfigError(f"--model {name} must be a known model; did you mean {' or '.join(near)}?")
    return ModelSection.model_validate({"variant": variant} | VARIANTS[variant])


def require_open_clip(option: str, otherwise: str = "") -> None:
    """Returns where open_clip is installed, which `option` needs.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(
            f"{option} needs open_clip, which is not installed; run pip install 'megaeva[eval]'{otherwise}."
        )


def _check_step(model: ModelSection, peer: str, part: str) -> None:
    if peer == "padded" and part == "vision":
        raise ConfigError(
            "--part vision has no captions, --peer padded measures theirs; use --part text or --part both."
        )
    if peer != "open_clip":
        return
    if part != "both":
        raise ConfigError(f"--part {part} --peer open_clip: open_clip trains both towers; use --part both.")
    if model.variant not in OPEN_CLIP_NAMES:
        raise ConfigError(
            f"--model {model.variant} --peer open_clip: open_clip has no such model; it must be one of "
            f"{', '.join(OPEN_CLIP_NAMES)}, or use --peer plain."
        )
    require_open_clip("--peer open_clip", ", or use --peer plain")


def _check_loss(batches: Sequence[int], peer: str, ranks: int) -> None:
    for batch in batches:
        if batch % ranks:
            raise ConfigError(
                f"--batch {batch} is of all ranks together and must be a multiple of --ranks {ranks}; "
                f"use --batch {(batch // ranks + 1) * ranks}."
            )
    if peer == "none":
        return
    require_open_clip("--peer open_clip", ", or use --peer none")
    # Two matrices of logits and their log-softmaxes, in fp32 for the comparison of values; on each rank of its own.
    needed, available = 16 * max(batches) ** 2 * ranks, psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"--peer open_clip keeps {needed / 2**30:.0f} GiB of logits at --batch {max(batches)} --ranks {ranks}, "
            f"which must fit in the {available / 2**30:.0f} GiB that are free; use a smaller batch or --peer none."
        )
