"""torchrun -m megaeva.eval.run RUN_DIR [--output FOLDER] [--ema] [key.path=value ...]

Measures a trained CLIP on the sets of its own recipe, or on others given as `eval.retrieval.NAME.shards=[...]`. Works
alone or under torchrun, with any number of processes (see `eval_layout`). Exit codes: those of `megaeva.train`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from megaeva.checkpoint.layout import FOLDER_NAME
from megaeva.config.schema import Config
from megaeva.errors import CheckpointError, ConfigError, explain_end

_AVERAGED = "ema/"
"""Before a set's name: the figures are those of the averages of the weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes eval.json and predictions.json, prints the figures, returns the exit code. Every rank of a job calls it.

    `RUN_DIR` is a run folder (its newest checkpoint) or one checkpoint in it. `--output`: see `results_folder`.
    """
    parser = argparse.ArgumentParser(prog="python -m megaeva.eval.run", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="run folder of a contrastive run, or one checkpoint of it")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set on top of the run's recipe")
    parser.add_argument("--output", type=Path, help="folder of eval.json and predictions.json")
    parser.add_argument("--ema", action="store_true", help="measure the average of the weights (optim.ema_decay)")
    options = parser.parse_intermixed_args(argv)

    def run() -> int:
        evaluate_run(options.run_dir, options.overrides, options.output, averaged=options.ema)
        return 0

    return explain_end(run)


def evaluate_run(
    run_dir: Path, overrides: Sequence[str], output: Path | None = None, *, averaged: bool = False
) -> dict[str, dict[str, float]]:
    """The figures of `megaeva.eval.harness.evaluate`, also written to `<output>/eval.json`. All ranks call it.

    Weights and their averages are measured one at a time: eval.json keeps what it says of the other.

    Args:
        averaged: of the averages of the weights; sets are then called `ema/<set>`, as by the trainer, and
            predictions.json, whose examples are of the weights themselves, is not written.

    Raises:
        UserError: the folder is not of a contrastive run, names no set, cannot be read, or has no averages.
    """
    from megaeva.config import load

    home = run_folder(run_dir)
    cfg = load(home / "config.yaml", overrides)
    if cfg.task != "contrastive":
        raise ConfigError(
            f"{run_dir} is a run of task={cfg.task}.\n"
            f"Only a CLIP, with both towers, can be measured; name the run folder of a contrastive run."
        )
    if not cfg.eval.retrieval and not cfg.eval.zero_shot:
        raise ConfigError(
            f"the recipe of {run_dir} names no evaluation set.\n"
            f"There must be at least one; add e.g. eval.retrieval.heldout.shards='[data/emoji/heldout/*.tar]'."
        )
    layout = eval_layout(cfg, int(os.environ.get("WORLD_SIZE", "1")), overrides)
    cfg = load(home / "config.yaml", [*overrides, *layout])
    # Imported here: mistakes above are told before torch and Megatron-core are loaded.
    from megaeva.checkpoint.convert.start import open_weights
    from megaeva.checkpoint.weights import agreed_path, load_weights
    from megaeva.config.topology import grid_axes
    from megaeva.eval.harness import evaluate
    from megaeva.model import build_clip
    from megaeva.parallel.collectives import together
    from megaeva.parallel.grid import build_grids
    from megaeva.parallel.runtime import start, stop

    runtime = start(cfg.platform, cfg.train.timeout_minutes)
    try:
        grids = build_grids(grid_axes(cfg), runtime)
        model = build_clip(
            cfg.model,
            vision_grid=grids["vision"],
            text_grid=grids["text"],
            precision=cfg.train.parameter_precision,
            layer_spec=runtime.layer_spec,
            device=runtime.device,
        )
        with together("opening weights"):
            weights = open_weights(agreed_path(run_dir), averaged=averaged)
        with closing(weights):
            load_weights(weights, {name: (getattr(model, name), grids[name]) for name in ("vision", "text", "scale")})
        folder = output or results_folder(run_dir)
        results = evaluate(
            model,
            cfg,
            grid=grids["data"],
            device=runtime.device,
            predictions=None if averaged else folder / "predictions.json",
        )
        if averaged:
            results = {f"{_AVERAGED}{name}": values for name, values in results.items()}
        if runtime.is_main:
            kept = _write_results(folder / "eval.json", results, averaged=averaged)
            print(format_results(results), flush=True)
            if kept:
                print(f"{folder / 'eval.json'} keeps, as measured before: {', '.join(kept)}", flush=True)
        return results
    finally:
        stop()


def _write_results(path: Path, results: dict[str, dict[str, float]], *, averaged: bool) -> list[str]:
    """Puts the figures in the place of those of the same weights; returns the names of the sets that stay."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or one cut off half way
        before = {}
    before = before if isinstance(before, dict) else {}
    kept = {name: values for name, values in before.items() if name.startswith(_AVERAGED) != averaged}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(kept | results if averaged else results | kept, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return list(kept)


def eval_layout(cfg: Config, num_processes: int, overrides: Sequence[str]) -> list[str]:
    """Overrides under which so many processes can evaluate `cfg`: none where its own layout fits, else whole towers.

    Rank 0 says so in a line, as evaluation needs more memory then.

    Raises:
        ConfigError: `overrides` ask for a layout of their own, and it does not fit.
    """
    from megaeva.config import check_world
    from megaeva.config.topology import sharing_ranks

    if num_processes % sharing_ranks(cfg) == 0:
        return []
    if any(override.startswith("parallel.") for override in overrides):
        check_world(cfg, num_processes)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"layout: the run's own needs a multiple of {sharing_ranks(cfg)} processes, these are {num_processes}; "
            "each holds whole towers instead (tp=pp=1)",
            flush=True,
        )
    whole = ("vision.tp=1", "vision.pp=1", "vision.vpp=1", "vision.layers_per_stage=null", "text.tp=1")
    return [f"parallel.{key}" for key in whole]


def run_folder(path: Path) -> Path:
    """The run folder that a path means: itself, or the one around a checkpoint.

    Raises:
        CheckpointError: there is no config.yaml at or above it.
    """
    for folder in (path, *path.parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder
    raise CheckpointError(
        f"{path} {'has no config.yaml' if path.exists() else 'does not exist'}.\n"
        f"It must be the run folder of a training run, or a checkpoint in one; check the path."
    )


def results_folder(path: Path) -> Path:
    """Where figures go: into the run folder, and for one checkpoint of it that was named, RUN/eval/step_N.

    Raises:
        CheckpointError: as `run_folder`.
    """
    home = run_folder(path)
    return home / "eval" / path.name if path.parent.name == FOLDER_NAME else home


def format_results(results: dict[str, dict[str, float]]) -> str:
    """One line for each set: `retrieval/heldout  image_to_text_r1 51.6  ...`, in percent."""
    width = max(map(len, results), default=0)
    lines = []
    for name, values in results.items():
        cells = "  ".join(f"{metric} {100 * value:.1f}" for metric, value in values.items())
        lines.append(f"{name:<{width}}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(main)())
