"""The `megaeva` command: doctor, demo, data, train, plan, loop, eval, convert, inspect, bench.

Nothing heavy is imported before a command runs: the help appears at once, and a mistake in a recipe is told before
torch is loaded. Mistakes of the user end in their message and exit code 2, a job that died in 1, Ctrl-C in 130.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megaeva.bench.cli import bench_app
from megaeva.errors import INTERRUPTED, ConfigError, DataError
from megaeva.options import Overrides, Recipe, explained, seed_numbers

if TYPE_CHECKING:
    from megaeva.config.schema import ModelSection

_NEXT_STEPS = """
Next:
  megaeva doctor                           what is installed, what is missing, how to mend it
  megaeva demo                             a CLIP from weak to strong on emoji, about ten minutes on two cores
  megaeva train recipes/demo_teacher.yaml  one run; any key can be set: train.total_samples=8000
  recipes/README.md                        every recipe and where its numbers come from
"""

_TRAIN_AGAIN = "run the command again, with --resume to continue from the last checkpoint if there is one."

app = typer.Typer(
    name="megaeva",
    help="Weak-to-strong training of CLIP models through Megatron-core.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make shards, or check the ones a recipe names.", rich_markup_mode=None)
app.add_typer(data_app, name="data", no_args_is_help=True)
app.add_typer(bench_app, name="bench", no_args_is_help=True)

Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes here, one for each GPU or core.")]
Variant = Annotated[
    str | None, typer.Option("--variant", metavar="NAME", help="The published model it is.", show_default=False)
]
ModelConfig = Annotated[
    Path | None,
    typer.Option("--model-config", metavar="FILE", help="A recipe whose `model` it is.", show_default=False),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each.", show_default=False)]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Weak-to-strong training of CLIP models through Megatron-core."""
    if version:
        from megaeva import __version__

        typer.echo(f"megaeva {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        typer.echo(_NEXT_STEPS)


@app.command()
@explained
def doctor() -> None:
    """Check the installation and print the fix of what is wrong.

    Exit code 1 if something that is needed is broken.
    """
    from megaeva.doctor import examine, print_report

    raise typer.Exit(0 if print_report(examine()) else 1)


@app.command()
@explained
def demo(
    run_dir: Annotated[Path | None, typer.Option(help="Where results go.", show_default="runs/demo")] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Three seeds and all controls, into runs/bench_demo.")] = False,
) -> None:
    """Train CLIPs from weak to strong on emoji.

    Makes the data set if it is absent, trains teacher, student and control, prints the table, writes report.html.
    """
    root = repository()
    target = run_dir.absolute() if run_dir is not None else root / "runs" / ("bench_demo" if bench else "demo")
    # The demo's recipes name data/ and runs/ relative to the repository.
    os.chdir(root)
    if not Path("data/emoji/index.json").exists():
        from megaeva.data.prepare.emoji import prepare_emoji

        typer.echo("Rendering the emoji data set into data/emoji ...")
        typer.echo(str(prepare_emoji(Path("data/emoji"))))
    shown = Path(os.path.relpath(target)) if target.is_relative_to(root) else target
    if bench:
        _run_seeds(Path("recipes/bench_demo.yaml"), [], shown, [0, 1, 2])
        return
    _run_loop(Path("recipes/demo.yaml"), [f"run_dir={shown}"])


@data_app.command("emoji")
@explained
def data_emoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Render OpenMoji and its names into shards.

    train, val, heldout (compositions that train lacks) and zero_shot, with the vocabulary and the attribution.
    """
    from megaeva.data.prepare.emoji import prepare_emoji

    typer.echo(str(prepare_emoji(out, seed=seed)))
    typer.echo(f"written: {out}")


@data_app.command("folder")
@explained
def data_folder(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Images, each with a .txt caption.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
) -> None:
    """Pack images and their .txt captions into shards."""
    from megaeva.data.prepare.folder import prepare_folder

    typer.echo(str(prepare_folder(source, out, samples_per_shard=samples_per_shard)))
    typer.echo(f"written: {out}")


@data_app.command("check")
@explained
def data_check(recipe: Recipe, overrides: Overrides = None, processes: Processes = 1) -> None:
    """Open the first shard that a recipe names.

    Shows its keys, sizes and a caption, or says what would stop a run.
    """
    from megaeva.config import check_world, load
    from megaeva.config.topology import sharing_ranks

    cfg = load(recipe, overrides or ())
    check_world(cfg, processes)
    from megaeva.data.preflight import preflight

    typer.echo(preflight(cfg, processes // sharing_ranks(cfg)))


@app.command()
@explained
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Processes = 1,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's newest checkpoint.")] = False,
    topology: Annotated[
        bool, typer.Option("--topology", help="Only print which rank holds what, its bytes, and all learning rates.")
    ] = False,
) -> None:
    """Train from a recipe on this machine.

    On a cluster: torchrun -m megaeva.train RECIPE [key.path=value ...], see recipes/train_slurm.sh.
    """
    from megaeva.checkpoint.layout import read_model_section
    from megaeva.config import check_world, load
    from megaeva.config.schema import LaunchSection
    from megaeva.config.validate import check_teacher

    cfg = load(recipe, overrides or (), processes)
    check_world(cfg, processes)
    if topology:
        from megaeva.planning.rates import rate_lines
        from megaeva.planning.topology import topology_lines

        typer.echo("\n".join([*topology_lines(cfg, processes), "", *rate_lines(cfg)]))
        return
    if cfg.teacher is not None:
        check_teacher(cfg, read_model_section(cfg.teacher.checkpoint).vision, processes)
    if not resume:
        refuse_old_run(Path(cfg.run_dir))
    from megaeva.loop.launch import launch

    section = LaunchSection(num_processes=processes, threads_per_process=threads)
    launch(recipe, overrides or [], section, Path(cfg.run_dir) / "train.log", resume, again=_TRAIN_AGAIN)


@app.command("plan")
@explained
def plan_run(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A YAML file of recipes/.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many, a process on each.")] = 8,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="a100-40, a100-80, h100-80, h200, b200, or a YAML file.")
    ] = "a100-80",
    search: Annotated[bool, typer.Option("--search", help="Try layouts; print the best, and why not others.")] = False,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="The published model it is, if no checkpoint is here.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write it as JSON too.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw memory by stage.")] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Only print published runs beside what is predicted of them.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Build one rank's share here and run a microbatch of it.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Whose share, with --rehearse.")] = 0,
    meta: Annotated[bool, typer.Option("--meta", help="Rehearse shapes only, without memory.")] = False,
) -> None:
    """Say what a recipe takes on a cluster: memory of each GPU, seconds of a step, days.

    By formulae, see megaeva/planning/formulae.py; nothing is started. --rehearse runs one rank's true share on this
    machine's CPU, in a world of fake processes, and holds the formulae to it.
    """
    named = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name}
    sources = {option: context.get_parameter_source(name) for name, option in named.items()}
    given = {option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    refuse_idle_options(given)
    if calibration:
        from megaeva.planning.calibration import calibration_lines

        typer.echo("\n".join(calibration_lines()))
        return
    if recipe is None:
        raise ConfigError(
            "megaeva plan needs a recipe (or --calibration); e.g. megaeva plan recipes/clip_eva_18b.yaml."
        )
    if rehearse:
        from megaeva.planning.command import run_rehearsal

        typer.echo("\n".join(run_rehearsal(recipe, overrides or [], gpus, rank, teacher_name=teacher, meta=meta)))
        return
    from megaeva.planning.command import run_plan

    lines = run_plan(
        recipe,
        overrides or [],
        gpus,
        gpu,
        teacher_name=teacher,
        searching=search,
        json_path=json_path,
        plot_path=plot_path,
    )
    typer.echo("\n".join(lines))


@app.command()
@explained
def loop(
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Repeat for these, e.g. 0,1,2; print mean and spread.", show_default=False),
    ] = None,
) -> None:
    """Run weak-to-strong rounds: distil, clip, evaluate.

    The same command again continues where it stopped.
    """
    if seeds is None:
        _run_loop(recipe, overrides or [])
        return
    from megaeva.config import load_loop

    numbers = seed_numbers(seeds)
    _run_seeds(recipe, overrides or [], Path(load_loop(recipe, overrides or ()).run_dir), numbers)


@app.command("eval")
@explained
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Of a contrastive run.", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of eval.json.", show_default="RUN_DIR; of RUN/checkpoints/S: RUN/eval/S")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The average of its weights (optim.ema_decay).")] = False,
    processes: Processes = 1,
    threads: Threads = None,
) -> None:
    """Measure a trained CLIP.

    On the sets of its recipe, or on sets given as eval.retrieval.NAME.shards=[...].
    """
    from megaeva.config import load
    from megaeva.config.schema import LaunchSection
    from megaeva.eval.run import eval_layout, results_folder, run_folder

    cfg = load(run_folder(run_dir) / "config.yaml", overrides or ())
    layout = eval_layout(cfg, processes, overrides or [])
    from megaeva.loop.launch import run_module

    average = ["--ema"] if ema else []
    output = output or results_folder(run_dir)
    arguments = [str(run_dir), "--output", str(output), *average, *(overrides or []), *layout]
    section = LaunchSection(num_processes=processes, threads_per_process=threads)
    log_path = output / "eval.log"
    run_module("megaeva.eval.run", arguments, section, log_path, stage="eval", again="run the same command again.")


@app.command()
@explained
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A file or folder of weights, or a run.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Must not exist.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="megaeva, eva, eva-mim, open_clip, openai, hf-clip, hf-eva, timm or onnx.",
            show_default=False,
        ),
    ],
    variant: Variant = None,
    model_config: ModelConfig = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize to it.", show_default="that of SRC")] = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="Resize to it.", show_default="that of SRC")] = None,
    resize: Annotated[
        Literal["upstream", "timm"], typer.Option(help="Bicubic as EVA-CLIP's scripts, or antialiased as timm.")
    ] = "upstream",
    shard_gib: Annotated[
        float, typer.Option(min=0.001, max=2**20, help="Largest file of a folder of safetensors.")
    ] = 5.0,
    ema: Annotated[bool, typer.Option("--ema", help="Of a run, the average of its weights (optim.ema_decay).")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare outputs with those of open_clip, timm or transformers.")
    ] = False,
) -> None:
    """Write weights in another format.

    The format of SRC is found out, and which model it is as far as its tensors or a file beside it say so. Streams:
    no more than a few tensors are in memory, but for onnx and --check.
    """
    model = _named_model(variant, model_config)
    from megaeva.export.command import run_convert

    lines = run_convert(
        source,
        destination,
        to,
        model=model,
        image_size=image_size,
        patch_size=patch_size,
        resize=resize,
        shard_bytes=int(shard_gib * 2**30),
        averaged=ema,
        check=check,
    )
    for line in lines:
        typer.echo(line)


@app.command()
@explained
def inspect(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file or folder of weights, or a run.", show_default=False)
    ],
    variant: Variant = None,
    model_config: ModelConfig = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every tensor: checksums, and finite numbers.")] = False,
) -> None:
    """Say what a file of weights or a checkpoint is.

    Its format, the models it could be, parameters, dtypes and shapes, and what is missing or not explained.
    """
    model = _named_model(variant, model_config)
    from megaeva.checkpoint.convert.inspect import inspect as lines_about

    for line in lines_about(source, model=model, tensors=tensors, verify=verify):
        typer.echo(line)


# ---------------------------------------------------------------------------------------------------------- helpers


def refuse_idle_options(given: set[str]) -> None:
    """Returns when each option of `megaeva plan` that was given does something beside the others.

    Raises:
        ConfigError: one would be ignored.
    """
    everything = {"recipe", "overrides", "--gpus", "--teacher"}
    of_plan = everything | {"--gpu", "--search", "--json", "--plot"}
    if "--calibration" in given:
        mode, allowed = "--calibration", {"--calibration"}
    elif "--rehearse" in given:
        mode, allowed = "--rehearse", everything | {"--rehearse", "--rank", "--meta"}
    else:
        mode, allowed = "megaeva plan without --rehearse", of_plan
    if idle := sorted(given - allowed):
        raise ConfigError(
            f"{mode} does nothing with {' and '.join(idle)}; beside it can be given "
            f"{', '.join(sorted(allowed - {mode})) or 'nothing'}; leave {'it' if len(idle) == 1 else 'them'} out"
            f"{', or add --rehearse.' if mode.startswith('megaeva') else '.'}"
        )


def repository() -> Path:
    """The checkout that holds recipes/: the one this package is installed from, else the current folder.

    Raises:
        DataError: neither holds recipes/demo.yaml.
    """
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "recipes" / "demo.yaml").is_file():
            return root
    raise DataError(
        "recipes/demo.yaml is neither beside the installed package nor in this folder, the demo needs a checkout; "
        "run `megaeva demo` in a clone of the repository."
    )


def refuse_old_run(run_dir: Path) -> None:
    """Returns when a fresh run may write to `run_dir`.

    Raises:
        ConfigError: checkpoints of an earlier run are there, which a fresh start would mix with its own.
    """
    if any((run_dir / "checkpoints").glob("step_*")):
        raise ConfigError(
            f"run_dir={run_dir} holds checkpoints of an earlier run, a fresh run needs a new folder; "
            "add --resume to continue it, or set run_dir=... to another folder."
        )


def _named_model(variant: str | None, model_config: Path | None) -> "ModelSection | str | None":
    if variant is not None and model_config is not None:
        raise ConfigError(
            f"--variant {variant} and --model-config {model_config} both say which model it is; one is enough; "
            "leave one out."
        )
    if model_config is None:
        return variant
    from megaeva.config import load_model

    return load_model(model_config)


def _run_loop(recipe: Path, overrides: list[str]) -> Path:
    from megaeva.config import load_loop

    cfg = load_loop(recipe, overrides)
    from megaeva.loop.weak_to_strong import run_loop

    run_loop(cfg, recipe)
    folder = Path(cfg.run_dir)
    typer.echo(f"results: {folder / 'results.json'}")
    if (folder / "report.html").exists():
        typer.echo(f"open {folder / 'report.html'} in a browser")
    return folder


def _run_seeds(recipe: Path, overrides: list[str], run_dir: Path, seeds: list[int]) -> None:
    """Runs a loop once for each seed in `run_dir/seed_N` and prints mean and spread."""
    folders = [_run_loop(recipe, [*overrides, f"seed={seed}", f"run_dir={run_dir / f'seed_{seed}'}"]) for seed in seeds]
    from megaeva.loop.aggregate import write_aggregate

    write_aggregate(folders, run_dir / "aggregate.json")
    typer.echo(f"mean and spread: {run_dir / 'aggregate.json'}")


def main() -> None:
    """Entry point of the `megaeva` command; does not return."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
