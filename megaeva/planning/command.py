"""`megaeva plan`: from a recipe's file to lines, JSON and a plot."""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaeva.checkpoint.layout import read_model_section_if_there
from megaeva.config import VARIANTS, check_world, load
from megaeva.config.schema import Config, ModelSection
from megaeva.config.validate import check_teacher
from megaeva.errors import ConfigError, UserError
from megaeva.planning.estimate import plan
from megaeva.planning.gpus import find_gpu
from megaeva.planning.report import plan_json, plan_lines, write_plot
from megaeva.planning.search import rejected_lines, remedies, search, search_lines


def run_plan(
    recipe: Path,
    overrides: list[str],
    num_gpus: int,
    gpu_name: str,
    *,
    teacher_name: str | None = None,
    searching: bool = False,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> list[str]:
    """Lines for the terminal; writes the files that are asked for.

    Raises:
        UserError: the recipe or the GPU cannot be read, the recipe does not go on so many GPUs, or no layout fits.
    """
    _check_writable("--json", json_path)
    _check_writable("--plot", plot_path)
    gpu = find_gpu(gpu_name)
    cfg = load(recipe, overrides)
    if cfg.train.precision not in gpu.peak_tflops:
        raise ConfigError(
            f"train.precision={cfg.train.precision} is not one that {gpu.name} multiplies in; it must be "
            f"{' or '.join(gpu.peak_tflops)}; set it, or name another --gpu."
        )
    if not searching:
        check_world(cfg, num_gpus)
    teacher = _teacher(cfg, recipe, teacher_name)
    if searching:
        found = search(cfg, num_gpus, gpu, teacher)
        lines, plans = search_lines(found), found.best
        tried, rejected = found.tried, rejected_lines(found)
        if not plans:
            raise UserError("\n".join(lines))
    else:
        plans = [plan(cfg, num_gpus, gpu, teacher)]
        lines = plan_lines(plans[0]) + remedies(plans[0], teacher)
    if json_path is not None:
        values: Any = [plan_json(one) for one in plans]
        values = {"tried": tried, "best": values, "not_possible": rejected} if searching else values[0]
        with _explained("--json", json_path):
            json_path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        with _explained("--plot", plot_path):
            write_plot(plans[0], plot_path)
    return lines


def _check_writable(option: str, path: Path | None) -> None:
    """Nothing where a file can be written; before the work, not after it."""
    if path is None:
        return
    with _explained(option, path):
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
            raise UserError(f"{option} {path} {what}; it must be a file in a folder that exists; name one, or make it.")


@contextmanager
def _explained(option: str, path: Path) -> Iterator[None]:
    """Whatever the disk answers, as a mistake in the option."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror or error}); it must be a file in a folder that can be "
            "written; choose another."
        ) from None


def run_rehearsal(
    recipe: Path,
    overrides: list[str],
    num_gpus: int,
    rank: int,
    *,
    teacher_name: str | None = None,
    meta: bool = False,
) -> list[str]:
    """Lines of `megaeva plan --rehearse`; imports torch.

    Raises:
        UserError: as `run_plan`; no such rank; or its share is larger than this machine's free memory.
    """
    cfg = load(recipe, overrides)
    check_world(cfg, num_gpus)
    teacher = _teacher(cfg, recipe, teacher_name)
    from megaeva.planning.rehearse import rehearsal_lines, rehearse

    return rehearsal_lines(rehearse(cfg, num_gpus, rank, teacher, meta=meta))


def _teacher(cfg: Config, recipe: Path, name: str | None) -> ModelSection | None:
    """The teacher's towers: of the name, of the checkpoint if it is there, else of the recipe beside this one that
    makes it; None where none of these says it, and for a run without one."""
    if cfg.teacher is None:
        if name is not None:
            raise ConfigError(f"--teacher {name} is for task=mim, {recipe} has task={cfg.task}; leave it out.")
        return None
    section = _named(name) if name is not None else _found(cfg.teacher.checkpoint, recipe)
    if section is not None:
        check_teacher(cfg, section.vision)
    return section


def _named(name: str) -> ModelSection:
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4) or list(VARIANTS)
        raise ConfigError(f"--teacher {name} must be a published model; did you mean {' or '.join(near)}?")
    return ModelSection.model_validate({"variant": name} | VARIANTS[name])


def _found(checkpoint: str, recipe: Path) -> ModelSection | None:
    if section := read_model_section_if_there(checkpoint):
        return section
    for other in sorted(recipe.parent.glob("*.yaml")):
        if other != recipe and f"run_dir: {checkpoint}" in other.read_text(encoding="utf-8"):
            maker = load(other)
            if maker.run_dir == checkpoint:
                return maker.model
    return None
