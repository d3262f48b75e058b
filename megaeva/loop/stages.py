"""What a loop consists of: every stage with its resolved recipe, known before the first one runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaeva.config import as_overrides, diff_from_base, load
from megaeva.config.schema import Config, LoopConfig, StageSection
from megaeva.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Stage:
    """One training job of a loop.

    Attributes:
        name: "teacher", or the round and the part: "round1/distil", "round1/clip", "round1/scratch".
        role: what it is for; a control is trained for comparison only and never promoted.
        config: its resolved recipe.
        inputs: names of earlier stages whose weights it starts from or learns from.
        changes: what its recipe and the loop set on top of the recipe's base, one line a key.
    """

    name: str
    role: Literal["teacher", "distil", "clip", "control"]
    config: Config
    inputs: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)

    @property
    def num_samples(self) -> int:
        """Samples this run sees in training."""
        return self.config.train.total_steps * self.config.train.global_batch_size


def plan_stages(cfg: LoopConfig, recipe_path: Path) -> list[Stage]:
    """All stages in the order they run; the first is the teacher unless `teacher.checkpoint` names one that exists.

    The student of a round is the teacher of the next. A stage's recipe is its file, then what the loop itself sets
    (`teacher.checkpoint` of a distil stage; `init.vision` and `init.text` of a clip stage; `seed`), then the stage's
    `set` keys, then `run_dir`. `{teacher}`, `{mim}` and `{run_dir}` in a value become run folders.

    Args:
        cfg: the loop.
        recipe_path: its file; stage recipes are found beside it.

    Raises:
        ConfigError: a recipe does not load, a placeholder is unknown, or two stages have one name.
    """
    assert (cfg.teacher.checkpoint is None) != (cfg.teacher.stage is None), "config.validate requires exactly one"
    stages: list[Stage] = []

    def add(name: str, role: Literal["teacher", "distil", "clip", "control"], section: StageSection,
            defaults: Mapping[str, object], places: Mapping[str, str]) -> str:  # fmt: skip
        if any(stage.name == name for stage in stages):
            raise ConfigError(
                f"{recipe_path} has two stages named {name!r}.\n"
                f"Names must be unique: rename one round or one control ('distil' and 'clip' are taken)."
            )
        run_dir = f"{cfg.run_dir}/{name}"
        values = {"seed": cfg.seed} | dict(defaults) | _fill(section.set, places, f"stage {name} in {recipe_path}")
        values["run_dir"] = run_dir
        recipe, overrides = recipe_path.parent / section.recipe, as_overrides(values)
        config = load(recipe, overrides)
        sources = {config.init.clip, config.init.vision, config.init.text}
        sources.add(config.teacher.checkpoint if config.teacher else None)
        inputs = tuple(stage.name for stage in stages if stage.config.run_dir in sources)
        stages.append(Stage(name, role, config, inputs, tuple(diff_from_base(recipe, overrides))))
        return run_dir

    teacher = cfg.teacher.checkpoint or ""
    if cfg.teacher.stage is not None:
        teacher = add("teacher", "teacher", cfg.teacher.stage, {}, {"run_dir": cfg.run_dir})
    for part in cfg.rounds:
        places = {"teacher": teacher, "run_dir": cfg.run_dir}
        mim = add(f"{part.name}/distil", "distil", part.distil, {"teacher.checkpoint": teacher}, places)
        places["mim"] = mim
        start = {"init.vision": mim, "init.text": teacher}
        student = add(f"{part.name}/clip", "clip", part.clip, start, places)
        for name, control in part.controls.items():
            add(f"{part.name}/{name}", "control", control, {}, places)
        teacher = student
    return stages


def chain_samples(stage: Stage, stages: list[Stage]) -> int:
    """Samples seen by a stage and by every stage its weights descend from, each counted once."""
    by_name = {other.name: other for other in stages}
    waiting, seen = [stage.name], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(by_name[name].inputs)
    return sum(by_name[name].num_samples for name in seen)


def _fill(tree: Any, places: Mapping[str, str], where: str) -> Any:
    """`tree` with placeholders in its strings replaced."""
    if isinstance(tree, dict):
        return {key: _fill(value, places, where) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_fill(value, places, where) for value in tree]
    if not isinstance(tree, str):
        return tree
    unknown = [name for name in _PLACEHOLDER.findall(tree) if name not in places]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in places)
        raise ConfigError(f"{where} has {{{unknown[0]}}} in {tree!r}.\nIt must be one of {known}; replace it.")
    return _PLACEHOLDER.sub(lambda match: places[match.group(1)], tree)
