"""The commands of `megaeva bench`; nothing heavy is imported before one runs."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from megaeva.errors import ConfigError
from megaeva.options import Overrides, Recipe, explained, seed_numbers

bench_app = typer.Typer(help="Measure beside plain PyTorch; print rows for benchmarks/log.md.", rich_markup_mode=None)


@bench_app.command("step")
@explained
def bench_step(
    model: Annotated[str, typer.Option(help="A published model, by its own or open_clip's name.")] = "EVA02-CLIP-B-16",
    batch: Annotated[int, typer.Option(min=2, help="Samples of a step.")] = 16,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option()] = "fp32",
    peer: Annotated[
        Literal["open_clip", "plain", "padded", "none"],
        typer.Option(
            help="open_clip: its own step, real captions. plain: the same model in plain PyTorch. padded: our step, "
            "captions not shortened."
        ),
    ] = "plain",
    part: Annotated[Literal["both", "vision", "text"], typer.Option(help="Towers that are trained.")] = "both",
    profile: Annotated[bool, typer.Option("--profile", help="Shares of the step's parts; no peer.")] = False,
    optimizer: Annotated[Literal["adamw", "lamb"], typer.Option(help="With --profile; peers have AdamW.")] = "adamw",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each side.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
) -> None:
    """Time a training step of one rank through Megatron-core."""
    from megaeva.bench.command import run_profile, run_step

    if optimizer != "adamw" and not profile:
        raise ConfigError(
            f"--optimizer {optimizer} is measured by --profile only, peers train with AdamW; add --profile."
        )
    if profile:
        lines = run_profile(model, batch, precision, part, optimizer, rounds, threads)
    else:
        lines = run_step(model, batch, precision, peer, part, rounds, threads)
    for line in lines:
        typer.echo(line)


@bench_app.command("loss")
@explained
def bench_loss(
    batch: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Pairs of all ranks together; may be given again.", show_default="16384"),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Features of each.")] = 1024,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the features.")] = "fp32",
    peer: Annotated[
        Literal["open_clip", "none"], typer.Option(help="open_clip: its ClipLoss. none: our memory at each --batch.")
    ] = "open_clip",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the batch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each side.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each rank.", show_default="all cores, shared")
    ] = None,
) -> None:
    """Time the contrastive loss with its gradients.

    Prints memory and rounding errors too, and with --ranks the bytes that each sends.
    """
    from megaeva.bench.command import run_loss

    for line in run_loss(batch or [16384], dim, precision, peer, ranks, rounds, threads):
        typer.echo(line)


@bench_app.command("normalize-pack")
@explained
def bench_normalize_pack(
    num_samples: Annotated[int, typer.Option(min=1, help="Rows of each side.")] = 8192,
    embed_dim: Annotated[int, typer.Option(min=1)] = 1024,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option()] = "fp32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each side.")] = 21,
) -> None:
    """Time the native operator normalize_pack."""
    from megaeva.bench.normalize_pack import benchmark_normalize_pack, report

    timed = benchmark_normalize_pack(
        num_samples=num_samples, embed_dim=embed_dim, dtype=dtype, device=device, num_rounds=rounds
    )
    for line in report(timed):
        typer.echo(line)


@bench_app.command("fp8-gemm")
@explained
def bench_fp8_gemm() -> None:
    """Hold the products of emulated FP8 linears to mmaemu's, which have an H100's bits; needs mmaemu (extra test)."""
    from megaeva.bench.fp8_gemm import report

    for line in report():
        typer.echo(line)


@bench_app.command("data")
@explained
def bench_data(
    peer: Annotated[
        Literal["webdataset"],
        typer.Option(help="webdataset: open_clip's pipeline on webdataset, Pillow and torchvision."),
    ] = "webdataset",
    model: Annotated[
        str, typer.Option(help="A published model, for sizes of images and captions.")
    ] = "EVA02-CLIP-B-16",
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Decoding processes of each side.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of 20 batches of each side.")] = 7,
) -> None:
    """Time the loader on photographs of 512 pixels.

    Writes them to data/bench on the first run (60 MB).
    """
    from megaeva.bench.command import run_data

    for line in run_data(model, batch, peer, workers, rounds):
        typer.echo(line)


@bench_app.command("checkpoint")
@explained
def bench_checkpoint(
    model: Annotated[str, typer.Option(help="A published model.")] = "EVA02-CLIP-B-16",
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 16,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option()] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Saves of each kind.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    folder: Annotated[Path, typer.Option(help="Whose disk is written to; left as it was.")] = Path("build"),
) -> None:
    """Time what a training run waits for a checkpoint that is written beside it, and for one it waits for."""
    from megaeva.bench.command import run_checkpoint

    for line in run_checkpoint(model, batch, precision, rounds, threads, folder):
        typer.echo(line)


@bench_app.command("convert")
@explained
def bench_convert(
    model: Annotated[str, typer.Option(help="A published model.")] = "EVA02-CLIP-bigE-14-plus",
    rounds: Annotated[int, typer.Option(min=1, help="Conversions and copies of each kind.")] = 3,
    folder: Annotated[Path, typer.Option(help="Whose disk is written to; left as it was.")] = Path("build"),
) -> None:
    """Convert random weights from EVA's file to a run's folder and on to Hugging Face, beside the disk's plain copy.

    Needs three times the weights' bytes on the disk: 30 GB as it stands.
    """
    from megaeva.bench.command import run_convert

    for line in run_convert(model, rounds, folder):
        typer.echo(line)


@bench_app.command("sweep")
@explained
def bench_sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Numbers of processes, e.g. 1,2,4,8.")] = "1,2",
    layouts: Annotated[
        str, typer.Option(help="Words joined by _: dp, tpN, textN, ppN, vppN, sp, zero, mbN, recompute.")
    ] = "dp,tp2",
    sizes: Annotated[str, typer.Option(help="Variants of the model.", show_default="the recipe's")] = "",
    precisions: Annotated[str, typer.Option(help="e.g. fp32,bf16.", show_default="the recipe's")] = "",
    scaling: Annotated[
        Literal["strong", "weak", "both"], typer.Option(help="strong: one global batch. weak: it grows with the ranks.")
    ] = "both",
    steps: Annotated[int, typer.Option(min=1, help="That are timed, of each run.")] = 8,
    peak_tflops: Annotated[
        float | None, typer.Option(help="Of one rank, for MFU.", show_default="a known GPU's; torch.mm's of a CPU")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where rows.jsonl, tables.md, sweep.svg and runs/ go.")] = Path(
        "runs/sweep"
    ),
) -> None:
    """Time a few steps of a recipe in every layout, size, precision and number of ranks.

    The same command again continues where it stopped, and another one adds its rows. Exit code 1 if a run failed. In a
    Slurm allocation of several nodes each run is started on those it needs.
    """
    from megaeva.bench.command import run_sweep

    numbers = ranks.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--ranks {ranks} must be whole numbers above 0 with commas between; e.g. --ranks 1,2.")
    if peak_tflops is not None and not 0 < peak_tflops < math.inf:
        raise ConfigError(f"--peak-tflops {peak_tflops:g} must be above 0 and finite; e.g. 312 for an A100 in bf16.")
    went_well = run_sweep(
        recipe,
        overrides or [],
        ranks=[int(number) for number in numbers],
        layouts=layouts.split(","),
        sizes=[size for size in sizes.split(",") if size],
        precisions=[precision for precision in precisions.split(",") if precision],
        scaling=scaling,
        steps=steps,
        peak_tflops=peak_tflops,
        out=out,
    )
    raise typer.Exit(0 if went_well else 1)


@bench_app.command("plan-check")
@explained
def bench_plan_check() -> None:
    """Hold the planner's peak memory of a rank to fourteen small runs of layouts, precisions and tasks, on the CPU.

    Exit code 1 if one is more than 5 % off.
    """
    from megaeva.bench.command import run_plan_check

    raise typer.Exit(0 if run_plan_check() else 1)


@bench_app.command("layouts")
@explained
def bench_layouts(
    recipe: Annotated[Path, typer.Option(help="A contrastive recipe.")] = Path("recipes/demo_teacher.yaml"),
    samples: Annotated[int | None, typer.Option(min=1, help="Length of a run.", show_default="the recipe's")] = None,
    seeds: Annotated[str, typer.Option(help="Of the 1-rank runs, whose spread is the measure.")] = "0,1,2",
    run_dir: Annotated[Path, typer.Option(help="Where the runs and layouts.json go.")] = Path("runs/bench_layouts"),
) -> None:
    """Train a recipe on 1 rank and in every layout of 2, and compare the recall.

    The same command again continues where it stopped. Exit code 1 if a layout fails or lies outside the seeds' noise.
    """
    from megaeva.bench.command import run_layouts

    raise typer.Exit(0 if run_layouts(recipe, samples, seed_numbers(seeds), run_dir) else 1)


@bench_app.command("fp8")
@explained
def bench_fp8(
    recipe: Annotated[Path, typer.Option(help="A loop; its controls are left out.")] = Path("recipes/demo.yaml"),
    precisions: Annotated[
        str, typer.Option(help="Of every stage; bf16 must be among them.")
    ] = "fp32,bf16,fp8_delayed,fp8_current",
    seeds: Annotated[str, typer.Option()] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Chains side by side, each on one thread.")] = 2,
    run_dir: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/bench_fp8"),
    out: Annotated[Path, typer.Option(help="Where fp8.json and fp8_curves.svg go.")] = Path("benchmarks"),
) -> None:
    """Train a chain in fp32, bf16 and emulated FP8, and compare the recall.

    The same command again continues where it stopped. Exit code 1 if a precision is more than a point from bf16.
    """
    from megaeva.bench.command import run_fp8

    raise typer.Exit(0 if run_fp8(recipe, precisions.split(","), seed_numbers(seeds), run_dir, out, jobs) else 1)
