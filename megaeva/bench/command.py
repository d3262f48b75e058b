"""`megaeva bench step` and `layouts`: check their options before torch is loaded, and print what was measured."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError


def run_step(
    variant: str,
    batch: int,
    precision: Literal["fp32", "bf16"],
    peer: Literal["plain", "padded", "none"],
    part: Literal["both", "vision", "text"],
    rounds: int,
    threads: int | None,
) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        ConfigError: an unknown variant, or a peer that the part does not have.
    """
    model = find_model(variant)
    if peer == "padded" and part == "vision":
        raise ConfigError(
            "--part vision has no captions, --peer padded measures theirs; use --part text or --part both."
        )
    import torch

    from megaeva.bench.step import benchmark_step

    if threads:
        torch.set_num_threads(threads)
    command = (
        f"megaeva bench step --peer {peer} --variant {variant} --batch {batch} --precision {precision} --part {part} "
        f"--rounds {rounds} --threads {torch.get_num_threads()}"
    )
    yield command
    times = benchmark_step(model, batch_size=batch, precision=precision, peer=peer, part=part, num_rounds=rounds)
    yield from times.report(command)


def run_data(variant: str, batch: int, peer: Literal["webdataset"], workers: int, rounds: int) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        UserError: an unknown variant, or a package that the benchmark needs is not installed.
    """
    model = find_model(variant)
    from megaeva.bench.data import benchmark_data

    command = (
        f"megaeva bench data --peer {peer} --variant {variant} --batch {batch} --workers {workers} --rounds {rounds}"
    )
    yield command
    yield from benchmark_data(model, batch_size=batch, num_workers=workers, num_rounds=rounds).report(command)


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


def find_model(variant: str) -> ModelSection:
    """The published model of that name.

    Raises:
        ConfigError: there is none.
    """
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=3) or list(VARIANTS)
        raise ConfigError(f"--variant {variant} must be a known model; did you mean {' or '.join(near)}?")
    return ModelSection.model_validate({"variant": variant} | VARIANTS[variant])
