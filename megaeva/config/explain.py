"""From pydantic's errors and broken rules to lines of three parts: what is, what must be, what to do."""

import difflib
import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from megaeva.config.problem import Problem
from megaeva.config.schema import Config, LoopConfig, Section
from megaeva.config.source import Keys, Source, get_in
from megaeva.config.validate import UnknownValue


def section_of(annotation: Any) -> type[Section] | None:
    """The Section class inside an annotation such as `Section | None`, `tuple[Section, ...]`, `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for arg in get_args(annotation):
        if (found := section_of(arg)) is not None:
            return found
    return None


def is_free(annotation: Any) -> bool:
    """Whether keys under it are the user's own: `dict[str, ...]` or `tuple[..., ...]`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(is_free(a) for a in get_args(annotation))
    return get_origin(annotation) in (dict, tuple)


def _known_keys(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        inner = section_of(info.annotation)
        if inner is not None and not is_free(info.annotation):
            found.extend(_known_keys(inner, f"{prefix}{name}."))
    return found


def _model_at(model: type[Section], keys: Keys) -> type[Section]:
    """The section class that holds the last of `keys`."""
    current = model
    for key in keys[:-1]:
        info = current.model_fields.get(key)
        inner = section_of(info.annotation) if info is not None else None
        current = inner if inner is not None else current
    return current


def _nearest_key(model: type[Section], keys: Keys) -> str:
    """What to do about an unknown key: its nearest sibling, else the place where that name lives, else the list."""
    if "." in keys[-1]:
        return f"nest it in the file: {keys[-1].replace('.', ': {')}: ...{'}' * keys[-1].count('.')}"
    siblings = list(_model_at(model, keys).model_fields)
    prefix = ".".join(keys[:-1]) + "." if len(keys) > 1 else ""
    known = _known_keys(model)
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == keys[-1]]
    near = difflib.get_close_matches(keys[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}"
    if model is LoopConfig and keys[0] in Config.model_fields:
        return "it belongs to a stage: write teacher.stage.set., rounds.0.distil.set. or rounds.0.clip.set. before it"
    near = difflib.get_close_matches(".".join(keys), known, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}"
    return f"known here: {', '.join(siblings)}"


_MUST_BE = {
    "int_type": "an integer", "int_parsing": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "dict_type": "a mapping of keys", "model_type": "a section of keys", "model_attributes_type": "a section of keys",
    "tuple_type": "a list", "list_type": "a list", "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}  # fmt: skip
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_ADVICE = {
    "int_type": "write a whole number without quotes", "float_type": "write a number without quotes, e.g. 1e-3",
    "bool_type": "write true or false", "string_type": "put it in quotes", "tuple_type": "write [a, b]",
}  # fmt: skip


def explain(source: Source, model: type[Section], values: Any, error: Mapping[str, Any]) -> None:
    """Turns one pydantic error into our three-part line."""
    keys = tuple(str(part) for part in error["loc"])
    kind, context = str(error["type"]), error.get("ctx", {})
    value = get_in(values, keys)
    info = _model_at(model, keys).model_fields.get(keys[-1]) if keys else None
    about = f" ({info.description})" if info is not None and info.description else ""
    if keys in source.failed:
        return  # already told, e.g. a ${...} that is now no number either
    if isinstance(value, str) and kind in _MUST_BE:
        value = f'"{value}"'
    if kind == "extra_forbidden":
        source.fail(keys, "is not a known key", _nearest_key(model, keys), value)
    elif kind == "missing":
        source.fail(keys, f"is missing{about}", "add it")
    elif kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        source.fail(keys, f"must be {' or '.join(allowed)}", f"use {near[0]}" if near else "choose one", value)
    elif kind == "value_error":  # a validator of ours, whose text is what must be
        source.fail(keys, str(context["error"]), f"correct it{about}", value)
    elif kind in ("too_long", "too_short"):
        source.fail(keys, f"has the wrong number of entries: {error['msg']}", "add or remove entries", value)
    elif limits := [(word, context[name]) for name, word in _LIMITS.items() if name in context]:
        source.fail(keys, f"must be {' and '.join(f'{w} {v:g}' for w, v in limits)}", f"change it{about}", value)
    elif value is None and kind in ("dict_type", "model_type") and isinstance(get_in(values, keys[:-1]), Mapping):
        around = _model_at(model, keys[:-1]).model_fields.get(keys[-2]) if len(keys) > 1 else None
        name, then = ".".join(keys), ""
        if around is not None and is_free(around.annotation):  # one of several, which cannot go alone
            name, then = ".".join(keys[:-1]), ", then add those to keep"
        source.fail(keys, f"must be {_MUST_BE[kind]}", f"to drop what is inherited set {name}={{}}{then}", value)
    else:
        must = _MUST_BE.get(kind)
        advice = _ADVICE.get(kind, f"correct it{about}")
        source.fail(keys, f"must be {must}" if must else f"is not valid: {error['msg']}", advice, value)


class Partial:
    """A broken recipe seen as its section: defaults filled in, unreadable fields raise `UnknownValue`."""

    def __init__(self, model: type[Section], values: Mapping[str, Any], bad: frozenset[Keys], keys: Keys) -> None:
        self.__dict__["_parts"] = (model, values, bad, keys)

    def __getattr__(self, name: str) -> Any:
        model, values, bad, keys = self.__dict__["_parts"]
        info, path = model.model_fields.get(name), (*keys, name)
        if info is None:
            computed = getattr(model, name)
            assert isinstance(computed, property)
            assert computed.fget is not None
            return computed.fget(self)
        if path in bad:
            raise UnknownValue(".".join(path))
        if name not in values:
            return info.get_default()
        return _partial_value(info.annotation, values[name], bad, path)


def _partial_value(annotation: Any, value: Any, bad: frozenset[Keys], keys: Keys) -> Any:
    inner = section_of(annotation)
    if inner is None or value is None:
        # A bad entry inside a plain list or mapping makes the whole of it unreadable.
        if any(path[: len(keys)] == keys for path in bad):
            raise UnknownValue(".".join(keys))
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, list):
        return [Partial(inner, v, bad, (*keys, str(i))) for i, v in enumerate(value) if isinstance(v, Mapping)]
    if not is_free(annotation):
        return Partial(inner, value, bad, keys)
    return {k: Partial(inner, v, bad, (*keys, k)) for k, v in value.items() if isinstance(v, Mapping)}


def report(source: Source, values: Any, view: Any, problem: Problem) -> None:
    """Notes a broken rule with the value it saw: written by someone, filled in by the variant, or a default."""
    keys = tuple(problem.key.split("."))
    value = get_in(values, keys)
    if value is None:
        value = view
        for key in keys:
            value = value[int(key)] if key.isdigit() else value[key] if isinstance(value, dict) else getattr(value, key)
        if value is not None:
            source.places[keys] = "default"
    elif keys not in source.places and get_in(source.values, keys) is None:
        source.places[keys] = f"by model.variant at {source.place(('model', 'variant'))}"
    scalar = value is not None and not isinstance(value, (Mapping, Section, Partial))
    source.fail(keys, problem.must, problem.do, value if scalar else ...)
