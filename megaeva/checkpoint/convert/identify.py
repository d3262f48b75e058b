"""What a file is: its format by names, its model by the configuration beside it or by names and shapes of tensors.

What shapes cannot tell (activation, place of norms, heads) is never guessed: it is given, or read from a configuration,
or belongs to the one published variant that explains the file exactly.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.eva import OF_DISTILLATION
from megaeva.checkpoint.convert.format import Format, formats
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import Imported, differences
from megaeva.checkpoint.tensors import TensorSource
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError, listed

_SHOWN = 6
_UNSEEN = {
    "vision": ("num_heads", "activation", "norm_position", "norm_epsilon", "rope", "rope_pretrain_grid"),
    "text": ("num_heads", "activation", "norm_epsilon"),
}
"""Keys that no shape shows, of towers whose tensors have the same names."""


def recognise(source: TensorSource) -> Format:
    """Returns the format of a file, by the names of its tensors.

    Raises:
        CheckpointError: none of ours; lists names that it has.
    """
    names = source.infos.keys()
    for form in formats():
        if form.recognises(names):
            return form
    seen = ", ".join(list(names)[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    raise CheckpointError(
        f"{source.path} holds {seen or 'no tensor'}: no format has these names; it must be one of "
        f"{', '.join(form.name for form in formats())}, or a run's folder; give the weights of a CLIP with ViT towers, "
        "or of an EVA vision tower."
    )


def identify(source: TensorSource, form: Format, *, model: ModelSection | str | None = None) -> Contents:
    """Returns what a file of `form` holds, once its table explains every tensor.

    Args:
        model: what the user says that it is: sizes, or a name in VARIANTS. Of a configuration beside the file only the
            preprocessing is taken then, and one that cannot be read is passed over.

    Raises:
        CheckpointError: the model given, or the configuration beside the file, contradicts the tensors or the other;
            or nothing is given and no published variant fits, or several that differ in what shapes do not show.
    """
    if model is not None:
        section = published(model) if isinstance(model, str) else model
        what = _as_file(source, form, _given(source, form, section))
        _must_fit(source, form, what, f"the model given ({section.variant or 'its sizes'})")
        return what
    beside = form.read_config(source.path)
    if beside is not None:
        what = replace(beside, source=source.path)
        _must_fit(source, form, what, "the configuration beside it")
        return what
    found = {name: _as_variant(source, form, name) for name in candidates(source, form)}
    if not found:
        raise _nothing_fits(source, form)
    first, *others = found.values()
    if any(_meaning(other) != _meaning(first) for other in others):
        raise _several_fit(source, found)
    return first


def candidates(source: TensorSource, form: Format) -> list[str]:
    """Returns the published variants whose tables explain every tensor of the file, in the order of VARIANTS."""
    return [name for name in _possible(form) if _may_be(source, form, name) and not _faults(source, form, name)]


def settled(source: TensorSource, form: Format, model: ModelSection | str | None) -> tuple[Contents, list[str]]:
    """What `identify` returns, and the lines of `taken_by_name` where no model is given."""
    what = identify(source, form, model=model)
    return what, [] if model is not None else taken_by_name(source, form, what)


def in_ours(source: TensorSource, form: Format, what: Contents) -> Imported:
    """A file of `form`, in our names. Raises as `Imported`."""
    return Imported(source, form.rules(what, source.infos.keys()), shapes(what))


def taken_by_name(source: TensorSource, form: Format, what: Contents) -> list[str]:
    """Returns a line for the report: what the tensors do not show, and where it was taken from instead.

    Args:
        what: of `identify` without a model.
    """
    if form.read_config(source.path) is not None:
        return []
    names = candidates(source, form)
    values = [f"{key}={value}" for key, value in _values(what.model, _unseen(what)).items() if key not in form.implied]
    return [
        f"taken for {' or '.join(names)}, which no other variant's shapes are; not shown by them: {', '.join(values)}"
    ]


def published(name: str) -> ModelSection:
    """Returns the sizes of a variant.

    Raises:
        CheckpointError: there is none of this name; says which are near.
    """
    if name not in VARIANTS:
        folded = {variant.lower(): variant for variant in VARIANTS}
        near = [folded[n] for n in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.4)]
        raise CheckpointError(
            f"{name} is not a known variant; it must be a name in VARIANTS; did you mean "
            f"{' or '.join(near or list(VARIANTS))}?"
        )
    return ModelSection.model_validate({**VARIANTS[name], "variant": name})


# ---------------------------------------------------------------------------------------------------------- comparison


def _possible(form: Format) -> list[str]:
    """The variants that a file of this format could be, whatever its tensors."""
    names = []
    for name in VARIANTS:
        what = Contents(form.kinds[0], published(name))
        if form.refusal(what) is None and _values(what.model, form.implied) == form.implied:
            names.append(name)
    return names


def _as_variant(source: TensorSource, form: Format, name: str) -> Contents:
    return _as_file(source, form, Contents(form.kinds[0], published(name)))


def _may_be(source: TensorSource, form: Format, name: str) -> bool:
    """False where a look at the size rules a variant out; what a file holds beside weights is under 1 % of it."""
    numbers = sum(math.prod(info.shape) for info in source.infos.values())
    expected = sum(math.prod(shape) for shape in shapes(_as_variant(source, form, name)).values())
    return abs(numbers - expected) < 0.01 * numbers


def _faults(source: TensorSource, form: Format, name: str) -> list[str]:
    """What keeps a file from being a variant."""
    what = _as_variant(source, form, name)
    return differences(form.rules(what, source.infos.keys()), source.infos, shapes(what))


def _as_file(source: TensorSource, form: Format, what: Contents) -> Contents:
    """`what` with that which only the file decides, whatever variant it is of."""
    infos = source.infos
    vision, scale = what.model.vision, what.model.logit_scale
    if what.kind == "mim":
        whole = all(name in infos for name in OF_DISTILLATION) and len(infos["lm_head.bias"].shape) == 1
        what = replace(what, teacher_dim=infos["lm_head.bias"].shape[0] if whole else None)
        # Towers that were distilled with EVA's code lack the inner norm that the CLIP of the same name has.
        if not any(name.endswith("attn.inner_attn_ln.weight") for name in infos):
            vision = vision.model_copy(update={"sub_ln_attention": False})
    has_bias = "logit_bias" in infos and infos["logit_bias"].shape == ()
    scale = scale.model_copy(update={"bias": source.read("logit_bias").item() if has_bias else None})
    return replace(
        what, model=what.model.model_copy(update={"vision": vision, "logit_scale": scale}), source=source.path
    )


def _must_fit(source: TensorSource, form: Format, what: Contents, origin: str) -> None:
    faults = []
    for key, value in form.implied.items():
        has = _values(what.model, [key])[key]
        if has != value:
            faults.append(f"{key}: is {has}, must be {value} in this format")
    towers = {"vision": what.model.vision} | ({"text": what.model.text} if what.kind == "clip" else {})
    odd = [
        f"{part}.num_heads: is {tower.num_heads}, must divide {part}.hidden_size, {tower.hidden_size}"
        for part, tower in towers.items()
        if tower.hidden_size % tower.num_heads
    ]
    faults += odd or differences(form.rules(what, source.infos.keys()), source.infos, shapes(what))
    if faults:
        raise CheckpointError(
            f"{source.path} ({form.name}) contradicts {origin}, {len(faults)} differences:\n{listed(faults, _SHOWN)}\n"
            "Every tensor must be explained on both sides; give the model that the file is of."
        )


def _nothing_fits(source: TensorSource, form: Format) -> CheckpointError:
    faults = {name: _faults(source, form, name) for name in _possible(form)}
    nearest = min(faults, key=lambda name: len(faults[name]))
    return CheckpointError(
        f"{source.path} ({form.name}) is no published variant; the nearest is {nearest}, {len(faults[nearest])} "
        f"differences:\n{listed(faults[nearest], _SHOWN)}\n"
        "The file must be whole, and of a variant, or have its configuration beside it; give the right file, or "
        "convert it with `megaeva convert --model-config`, which says what it is."
    )


def _several_fit(source: TensorSource, found: Mapping[str, Contents]) -> CheckpointError:
    leaves = {name: _meaning(what) for name, what in found.items()}
    keys = sorted(
        {key for one in leaves.values() for key in one if any(o.get(key) != one[key] for o in leaves.values())}
    )
    lines = [f"{name}: " + ", ".join(f"{key}={one.get(key)}" for key in keys) for name, one in leaves.items()]
    return CheckpointError(
        f"{source.path} fits several models, which differ in what shapes do not show:\n{listed(lines, _SHOWN)}\n"
        "It must be one of them, and no configuration beside it says which; give its name with "
        "`megaeva convert --variant`."
    )


def _meaning(what: Contents) -> dict[str, Any]:
    """The values that matter of a model, by dotted key; two that are equal are one model under two names."""
    model = what.model.model_dump(exclude={"variant"})
    if what.kind != "clip":
        del model["text"], model["logit_scale"]
    if what.kind == "mim":
        del model["embed_dim"]
    return _flat(model, "")


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _values(model: ModelSection, keys: Mapping[str, Any] | list[str]) -> dict[str, Any]:
    flat = _flat(model.model_dump(), "")
    return {key: flat[key] for key in keys}


def _given(source: TensorSource, form: Format, model: ModelSection) -> Contents:
    """The given model, prepared as the configuration beside the file says, where one can be read."""
    try:
        beside = form.read_config(source.path)
    except CheckpointError:  # of a model that is not ours, or damaged: it is the user's word that counts
        beside = None
    if beside is None:
        return Contents(form.kinds[0], model)
    keys = _unseen(beside)
    one, other = _values(beside.model, keys), _values(model, keys)
    lines = [f"{key}: is {other[key]}, the configuration says {one[key]}" for key in keys if one[key] != other[key]]
    if lines:
        raise CheckpointError(
            f"{source.path} ({form.name}): the model given contradicts the configuration beside it in what shapes "
            f"do not show:\n{listed(lines, _SHOWN)}\n"
            "Both must agree; leave the model out, or move the configuration away."
        )
    return replace(beside, model=model)


def _unseen(what: Contents) -> list[str]:
    """Dotted keys that the tensors of such a model do not show."""
    vision = what.model.vision
    shown = {"vision.activation"} if vision.activation == "swiglu" else set()
    if not vision.rope:
        shown.add("vision.rope_pretrain_grid")
    parts = ("vision", "text") if what.kind == "clip" else ("vision",)
    return [key for part in parts for key in (f"{part}.{name}" for name in _UNSEEN[part]) if key not in shown]
