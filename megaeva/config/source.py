"""YAML with its line numbers: reading one file, laying base, recipe and overrides over each other.

The nodes of the YAML tree are walked by hand, so that every key keeps the file and line that wrote it, and several
mistakes in one file are all noted.
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

Keys = tuple[str, ...]
COMMAND_LINE = "command line"


# ------------------------------------------------------------------------------------------------------------ YAML


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with the scalars of version 1.2: `1e-3` is a number, `no` and `12:30` and dates are text."""


class Dumper(yaml.SafeDumper):
    """Writes with `_Loader`'s scalars, so that what it leaves unquoted reads back as the same type."""


_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
)
for _class in (_Loader, Dumper):
    _class.yaml_implicit_resolvers = {}
for _name, _pattern, _starts in _SCALARS:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _starts)
Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def _scalar(tag: str, text: str) -> Any:
    """The value of one scalar; whole floats become int, so `total_samples: 9e9` is a count."""
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
        return int(number) if number.is_integer() else number
    return text


@dataclass
class Source:
    """Merged values, the place each key was written, the problems met on the way and the keys they concern."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    failed: set[Keys] = field(default_factory=set)

    def place(self, keys: Keys) -> str:
        """File and line of a key, or of the nearest section around it; empty if it was never written."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, "")

    def fail(self, keys: Keys, must: str, do: str, value: Any = ...) -> None:
        """Notes one mistake in the form `key=value (file:line) must; do.`"""
        equals = "" if value is ... else f"={shown(value)}"
        inside = [place for path, place in self.places.items() if path[: len(keys)] == keys]
        around = f"in {self.place(keys)}" if self.place(keys) else "default"
        place = self.places.get(keys) or (inside[0] if inside else around)
        self.failed.add(keys)
        self.errors.append(f"{'.'.join(keys) or 'recipe'}{equals} ({place}) {must}; {do}.")


def shown(value: Any) -> str:
    """The value as a message prints it, at most 60 characters."""
    text = json.dumps(value, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(node: yaml.Node, file: str, keys: Keys, source: Source, parents: tuple[int, ...]) -> Any:
    """The plain value under `node`; fills `source.places`."""
    source.places.setdefault(keys, f"{file}:{node.start_mark.line + 1}")
    if id(node) in parents:
        source.fail(keys, "is an alias of a section around it", "write the values out")
        return None
    parents = (*parents, id(node))
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            place = f"{file}:{key_node.start_mark.line + 1}"
            path = (*keys, key)
            if key in found:
                source.errors.append(
                    f"{'.'.join(path)} ({place}) is written twice, first at {source.places[path]}; keep one."
                )
                continue
            source.places[path] = place
            found[key] = _walk(value_node, file, path, source, parents)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_walk(item, file, (*keys, str(i)), source, parents) for i, item in enumerate(node.value)]
    if "${" in node.value:
        source.fail(keys, "uses ${...}, which is not supported", "write the value itself", node.value)
    if node.tag.removeprefix(_TAG) not in ("str", *(name for name, _, _ in _SCALARS)):
        source.fail(keys, f"has the tag {node.tag}, which is not supported", "remove the tag", node.value)
    try:
        value = _scalar(node.tag, node.value)
    except ValueError:  # an explicit tag that does not fit, e.g. !!int x
        return str(node.value)
    if isinstance(value, float) and not math.isfinite(value):
        source.fail(keys, "must be a finite number", "write one, or null where a key allows it", node.value)
        return None
    return value


def _read(path: Path, source: Source) -> dict[str, Any]:
    """The mapping in one YAML file, or {} with the problem noted in `source`."""
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        source.errors.append(f"{name} must be UTF-8 text, byte {err.start} is not; save it as UTF-8.")
        return {}
    except OSError as err:
        near = difflib.get_close_matches(path.name, neighbours(path), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}" if near else "check the path"
        why = "does not exist" if isinstance(err, FileNotFoundError) else f"cannot be read ({err.strerror})"
        source.errors.append(f"{name} {why}, a recipe (YAML file) must be there; {hint}.")
        return {}
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        line = f":{mark.line + 1}" if mark else ""
        source.errors.append(
            f"{name}{line} is not valid YAML ({err.problem or err.context}); "
            "check the indentation (spaces, no tabs), quotes and brackets on this line and the one above."
        )
        return {}
    except (yaml.YAMLError, RecursionError) as err:
        source.errors.append(f"{name} is not valid YAML ({str(err).splitlines()[0]}); remove the odd characters.")
        return {}
    if not isinstance(node, yaml.MappingNode):
        source.errors.append(
            f"{name} is {'empty' if node is None else 'not a mapping'}; a recipe is `key: value` lines."
        )
        return {}
    return cast(dict[str, Any], _walk(node, name, (), source, ()))


def neighbours(path: Path) -> list[str]:
    """Names of the YAML files in `path`'s folder."""
    try:
        return [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------------- merging


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; mappings merge key by key, everything else is replaced, and by `{}` a mapping too."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value:
            value = merge(old, value)
        merged[key] = value
    return merged


def _lay_over(source: Source, values: dict[str, Any], places: Mapping[Keys, str]) -> None:
    """Merges values into `source`; places inside what was replaced as a whole are forgotten."""
    for keys, _ in leaves(values):
        if keys in places:
            for stale in [k for k in source.places if k[: len(keys)] == keys]:
                del source.places[stale]
    source.values = merge(source.values, values)
    source.places.update(places)


def leaves(values: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every value that is not a non-empty mapping, with its path."""
    if isinstance(values, Mapping) and (values or not keys):
        for key, value in values.items():
            yield from leaves(value, (*keys, str(key)))
    else:
        yield keys, values


def get_in(values: Any, keys: Iterable[str]) -> Any:
    """The value at a path through mappings and lists; None where there is none."""
    for key in keys:
        if isinstance(values, Mapping):
            values = values.get(key)
        elif isinstance(values, (list, tuple)) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    return values


def _apply_override(source: Source, text: str) -> None:
    """Sets one `key.path=value`; a number in the path is a list position."""
    name, equals, raw = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        source.errors.append(f"{text!r} ({COMMAND_LINE}) must be key.path=value; e.g. train.total_samples=1000.")
        return
    parsed = Source()
    try:
        node = yaml.compose(raw, Loader=_Loader)
    except yaml.YAMLError:
        quoted = '["...", "..."]' if raw.startswith("[") else '"..."'
        source.errors.append(
            f"{text!r} ({COMMAND_LINE}) has a value that is not valid YAML; quote it, e.g. '{name}={quoted}'."
        )
        return
    value = None if node is None else _walk(node, COMMAND_LINE, keys, parsed, ())
    source.failed |= parsed.failed
    source.errors.extend(e.replace(f"{COMMAND_LINE}:1", COMMAND_LINE) for e in parsed.errors)
    for index in range(len(keys) - 1, 0, -1):
        around = get_in(source.values, keys[:index])
        if isinstance(around, list):
            if not keys[index].isdigit() or int(keys[index]) >= len(around):
                source.errors.append(
                    f"{text!r} ({COMMAND_LINE}) names position {keys[index]} of {'.'.join(keys[:index])}, "
                    f"which has {len(around)} entries; count from 0."
                )
                return
            changed = list(around)
            old = changed[int(keys[index])]
            if isinstance(old, Mapping) and isinstance(value, Mapping) and value:
                value = merge(old, value)
            changed[int(keys[index])] = value
            value = changed
        else:
            value = {keys[index]: value}
    _lay_over(source, {keys[0]: value}, {keys: COMMAND_LINE})


def gather(path: Path, overrides: Sequence[str]) -> tuple[Source, dict[str, Any]]:
    """Base, recipe and overrides merged, before the variant; beside it the base's own values.

    A recipe without a base is its own base.
    """
    source, own = Source(), Source()
    own.values = _read(path, own)
    base_name = own.values.pop("base", None)
    base_values: dict[str, Any] = {}
    if base_name is None:
        base_values = copy.deepcopy(own.values)
    else:
        keys: Keys = ("base",)
        if not isinstance(base_name, str):
            own.fail(keys, "must be the name of one file", "a recipe has at most one base", base_name)
        elif not (path.parent / base_name).is_file():
            near = difflib.get_close_matches(Path(base_name).name, neighbours(path.parent / base_name), n=1, cutoff=0.5)
            hint = f"did you mean {Path(base_name).parent / near[0]}" if near else "it is looked up beside this recipe"
            own.fail(keys, f"names {path.parent / base_name}, which does not exist", hint, base_name)
        else:
            base_values = _read(path.parent / base_name, source)
            if "base" in base_values:
                grand = base_values.pop("base")
                source.fail(
                    keys, "stands in a base, which must not have a base of its own", "copy its keys here", grand
                )
                source.places.pop(keys, None)
            source.values = dict(base_values)
    source.errors.extend(own.errors)
    source.failed |= own.failed
    _lay_over(source, own.values, own.places)
    for text in overrides:
        _apply_override(source, text)
    return source, base_values
