"""Recipes: one YAML file, one optional base, `key.path=value` overrides, every mistake reported at once.

Precedence, weakest first: schema defaults, the model variant, the base, the recipe, the overrides.
`source.py` reads and merges, `schema.py` and `validate.py` check, `explain.py` words the errors.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from megaeva.config.explain import Partial, explain, is_free, report, section_of
from megaeva.config.problem import Problem
from megaeva.config.schema import Config, LoopConfig, ModelSection, Section, StageSection
from megaeva.config.source import COMMAND_LINE, Dumper, Keys, Source, gather, get_in, leaves, merge, shown
from megaeva.config.validate import LOOP_RULES, RULES, problems, with_working_values
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError

_ConfigT = TypeVar("_ConfigT", bound=Section)


def _expand_variant(source: Source) -> tuple[dict[str, Any], bool]:
    """The merged values with `model.variant` spelled out under them, and whether the variant is unknown."""
    values = source.values
    model = values.get("model")
    name = model.get("variant") if isinstance(model, dict) else None
    if not isinstance(model, dict) or name is None:
        return values, False
    if not isinstance(name, str) or name not in VARIANTS:
        folded = {v.lower(): v for v in VARIANTS}
        near = [folded[n] for n in difflib.get_close_matches(str(name).lower(), folded, n=3, cutoff=0.4)]
        source.fail(
            ("model", "variant"), "is not a known variant", f"did you mean {' or '.join(near or list(VARIANTS))}", name
        )
        return values, True
    return {**values, "model": merge(VARIANTS[name], model)}, False


def _check(
    model: type[_ConfigT],
    rules: Sequence[Callable[[_ConfigT], Iterator[Problem]]],
    source: Source,
    values: dict[str, Any],
    skip: Keys | None = None,
    processes: int | None = None,
) -> _ConfigT | None:
    """The validated config, or None with every problem noted in `source`; missing keys under `skip` are not told."""
    cfg: _ConfigT | None = None
    view: Any
    try:
        # JSON in strict mode: a list may be a tuple, but "8" is not 8 and true is not 1.
        view = cfg = model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as err:
        errors = err.errors(include_url=False)
        bad = frozenset(tuple(str(part) for part in e["loc"]) for e in errors)
        for error in errors:
            keys = tuple(str(part) for part in error["loc"])
            if not (skip and error["type"] == "missing" and keys[: len(skip)] == skip):
                explain(source, model, values, error)
        view = Partial(model, values, bad, ())
    found = problems(cast(_ConfigT, view), rules)
    for problem in with_working_values(view, found, processes):
        report(source, values, view, problem)
    return cfg if not found else None


def _finish(path: Path, source: Source) -> ConfigError:
    unique = list(dict.fromkeys(source.errors))
    if len(unique) == 1:
        return ConfigError(unique[0])
    return ConfigError("\n".join([f"{path} has {len(unique)} problems:", *(f"  {line}" for line in unique)]))


# ------------------------------------------------------------------------------------------------------ public


def load(path: str | Path, overrides: Sequence[str] = (), processes: int | None = None) -> Config:
    """The checked recipe at `path` with overrides applied.

    Args:
        path: a YAML file; its optional `base` is looked up beside it.
        overrides: `key.path=value`, the value in YAML.
        processes: of the run, where known: errors then name only values that `check_world` accepts too.

    Raises:
        ConfigError: every problem found, one per line, each with key, value, file:line, what must be, what to do.
    """
    path = Path(path)
    source, _ = gather(path, overrides)
    if not source.values and source.errors:
        raise _finish(path, source)
    if "rounds" in source.values:
        raise ConfigError(
            f"{path} is a loop (it has rounds), a training recipe is needed here; run megaeva loop {path}."
        )
    values, unknown_variant = _expand_variant(source)
    cfg = _check(Config, RULES, source, values, ("model",) if unknown_variant else None, processes)
    if source.errors or cfg is None:
        raise _finish(path, source)
    return cfg


class _ModelOnly(Section):
    model: ModelSection


def load_model(path: str | Path) -> ModelSection:
    """The checked `model` section of a YAML file, a recipe or not; other sections are not looked at.

    Raises:
        ConfigError: as `load`.
    """
    path = Path(path)
    source, _ = gather(path, ())
    values, _ = _expand_variant(source)
    cfg = None if source.errors else _check(_ModelOnly, (), source, {"model": values.get("model", {})})
    if cfg is None:
        raise _finish(path, source)
    return cfg.model


def load_loop(path: str | Path, overrides: Sequence[str] = ()) -> LoopConfig:
    """The checked weak-to-strong chain at `path`; the recipes of its stages are loaded and checked too.

    Raises:
        ConfigError: as `load`, with the problems of every stage.
    """
    path = Path(path)
    source, _ = gather(path, overrides)
    if not source.values and source.errors:
        raise _finish(path, source)
    if "task" in source.values and "rounds" not in source.values:
        raise ConfigError(
            f"{path} is a training recipe (it has a task), a loop is needed here; run megaeva train {path}."
        )
    cfg = _check(LoopConfig, LOOP_RULES, source, source.values)
    if cfg is not None:
        _check_stages(cfg, path, source)
    if source.errors or cfg is None:
        raise _finish(path, source)
    return cfg


def _check_stages(cfg: LoopConfig, path: Path, source: Source) -> None:
    stages: list[tuple[Keys, StageSection, str]] = []
    if cfg.teacher.stage is not None:
        stages.append((("teacher", "stage"), cfg.teacher.stage, "contrastive"))
    for i, one in enumerate(cfg.rounds):
        at: Keys = ("rounds", str(i))
        stages += [((*at, "distil"), one.distil, "mim"), ((*at, "clip"), one.clip, "contrastive")]
        stages += [((*at, "controls", name), stage, "contrastive") for name, stage in one.controls.items()]
    for keys, stage, task in stages:
        place = source.place((*keys, "recipe"))
        try:
            found = load(path.parent / stage.recipe, as_overrides(stage.set))
        except ConfigError as err:
            # Keys that this stage sets are in the loop's file, not on the command line.
            text = str(err).replace(f"({COMMAND_LINE})", f"(set at {source.place((*keys, 'set'))})")
            source.errors.append(f"{'.'.join(keys)} ({place}) does not load: {text}")
            continue
        if found.task != task:
            source.fail(
                (*keys, "recipe"), f"has task={found.task}, {task} is needed here", "name another recipe", stage.recipe
            )


def as_overrides(values: Mapping[str, object]) -> list[str]:
    """A stage's `set` as `key.path=value` strings, exact for every value that YAML can hold."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def dump(cfg: Config | LoopConfig, path: str | Path) -> None:
    """Nothing; writes the resolved recipe, every default spelled out, so that `load` returns an equal config."""
    path = Path(path)
    text = yaml.dump(cfg.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def diff_from_base(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Lines `train.total_samples: 1000 -> 80000`: what the recipe and the overrides change.

    Compared with the base, and where the base is silent with the schema's defaults; a key that has neither shows only
    its value. A recipe without a base is its own: only the overrides are listed. What a variant fills in is not
    repeated: `model.variant` says it.
    """
    source, base = gather(Path(path), overrides)
    variant = VARIANTS.get(str(get_in(source.values, ("model", "variant"))), {})
    model = LoopConfig if "rounds" in source.values else Config
    lines: list[str] = []
    for keys, value in leaves(source.values):
        old = get_in(base, keys)
        if old is None and not _written(base, keys):
            old = _default(model, keys)
            if keys[0] == "model" and (filled := get_in(variant, keys[1:])) is not None:
                old = filled
        if old is ...:
            lines.append(f"{'.'.join(keys)}: {shown(value)}")
        elif json.loads(json.dumps(old)) != value:
            lines.append(f"{'.'.join(keys)}: {shown(old)} -> {shown(value)}")
    return lines


def _written(values: Any, keys: Keys) -> bool:
    around = get_in(values, keys[:-1])
    return isinstance(around, Mapping) and keys[-1] in around


def _default(model: type[Section], keys: Keys) -> Any:
    """The schema's default of a key as plain data, or `...` where there is none."""
    current: Any = model
    for key in keys:
        if isinstance(current, type) and issubclass(current, Section):
            info = current.model_fields.get(key)
            if info is None or (is_free(info.annotation) and key != keys[-1]):
                return ...
            inner = section_of(info.annotation)
            current = info.get_default() if info.is_required() is False else (inner or ...)
            if current is None and inner is not None and key != keys[-1]:
                current = inner
        elif isinstance(current, Section):
            current = getattr(current, key, ...)
        else:
            return ...
    if isinstance(current, type):
        return ...
    return current.model_dump() if isinstance(current, Section) else current
