"""Conversion as two-way tables: each row names tensors of ours and tensors of theirs that hold the same numbers.

"Ours" are the keys of a run checkpoint: `vision.*`, `text.*`, `scale.*` of a CLIPModel, and `mask_token`, `lm_head.*`
beside `vision.*` of a MIM student, whole (tp=1). A table is checked against what it is applied to, before a number is
read: a tensor on either side that no row explains, or one of another shape, is an error that names it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megaeva.checkpoint.tensors import TensorInfo, TensorSource
from megaeva.errors import CheckpointError, listed

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse. Both keep dtypes and every bit, and run on meta tensors too."""

    to_ours: Callable[..., Tensors]
    to_theirs: Callable[..., Tensors]


def _unchanged(*tensors: Tensor) -> Tensors:
    return tensors


def _nothing(*_: Tensor) -> Tensors:
    return ()


def _transposed(tensor: Tensor) -> Tensors:
    return (tensor.t().contiguous(),)


SAME = Transform(_unchanged, _unchanged)
TRANSPOSED = Transform(_transposed, _transposed)  # x @ W against a linear layer's weight
CLS_TOKEN = Transform(lambda t: (t.view(1, 1, -1),), lambda t: (t.view(-1),))  # [D] and [1, 1, D]
BATCH_DIM = Transform(lambda t: (t.unsqueeze(0),), lambda t: (t.squeeze(0),))  # [N+1, D] and [1, N+1, D]
STACKED = Transform(lambda *t: (torch.cat(t),), lambda t: tuple(p.contiguous() for p in t.chunk(2)))  # w1, w2: [w1; w2]
DROPPED = Transform(_nothing, _nothing)


def interleaved(num_heads: int, num_theirs: int = 1) -> Transform:
    """[q; k; v] as one tensor of theirs or three, and mcore's rows [q, k, v] of head 0, of head 1, ..."""

    def to_ours(*tensors: Tensor) -> Tensors:
        full = torch.cat(tensors)
        width = full.shape[0] // (3 * num_heads)
        return (full.view(3, num_heads, width, *full.shape[1:]).transpose(0, 1).reshape(full.shape),)

    def to_theirs(tensor: Tensor) -> Tensors:
        width = tensor.shape[0] // (3 * num_heads)
        full = tensor.view(num_heads, 3, width, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        return (full,) if num_theirs == 1 else tuple(part.contiguous() for part in full.chunk(3))

    return Transform(to_ours, to_theirs)


@dataclass(frozen=True)
class Rule:
    """One row. `{i}` in its names stands for a layer's number until `for_layers`.

    Attributes:
        ours, theirs: names; `transform.to_ours(*theirs)` gives ours, `transform.to_theirs(*ours)` gives theirs. Without
            `ours` the row is about tensors that hold no weight: masks, angle tables. Its `to_ours` gives nothing, and
            raises a CheckpointError if they contradict the model.
        optional: an import goes on without `theirs`, and makes no `ours` then.
        written: an export holds `theirs`.
        like: the tensor of ours whose dtype an export gives `theirs`, of a row without `ours`.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = SAME
    optional: bool = False
    written: bool = True
    like: str | None = None


def copies(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Returns rows that only rename: (ours, theirs)."""
    return [Rule((ours,), (theirs,)) for ours, theirs in pairs]


def both(ours: str, theirs: str, has_bias: bool = True) -> list[Rule]:
    """Returns the renaming of a module's weight and, where it has one, bias."""
    return copies((f"{ours}.{p}", f"{theirs}.{p}") for p in (("weight", "bias") if has_bias else ("weight",)))


def dropped(*theirs: str) -> list[Rule]:
    """Returns rows of tensors that an import may meet and ignores, and an export leaves out."""
    return [Rule((), (name,), DROPPED, optional=True, written=False) for name in theirs]


def for_layers(rules: Sequence[Rule], num_layers: int) -> list[Rule]:
    """Returns the rows of one layer for all layers."""
    return [
        replace(rule, ours=tuple(n.format(i=i) for n in rule.ours), theirs=tuple(n.format(i=i) for n in rule.theirs))
        for i in range(num_layers)
        for rule in rules
    ]


def prefixed(rules: Sequence[Rule], ours: str, theirs: str) -> list[Rule]:
    """Returns the rows with a prefix before the names of either side."""
    return [
        replace(rule, ours=tuple(ours + n for n in rule.ours), theirs=tuple(theirs + n for n in rule.theirs))
        for rule in rules
    ]


# ------------------------------------------------------------------------------------------------------ plan and apply


def plan_export(rules: Sequence[Rule], ours: Mapping[str, TensorInfo], path: Path | str) -> dict[str, TensorInfo]:
    """Returns what an export holds, in the order of the table; nothing is read.

    Raises:
        CheckpointError: lists the tensors of ours (at `path`) that no row takes, and those that a row wants.
    """
    made, faults = _exported_infos(rules, ours)
    if faults:
        raise _not_explained(path, faults)
    return made


def _exported_infos(rules: Sequence[Rule], ours: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    faults: list[str] = []
    made: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for rule in rules:
        missing = [name for name in rule.ours if name not in ours]
        if missing and not (rule.optional and len(missing) == len(rule.ours)):
            faults.append(f"{', '.join(missing)}: missing, {', '.join(rule.theirs)} is made of it")
        if missing:
            continue
        used.update(rule.ours)
        if rule.written:
            outs = _to_theirs(rule, ours, *(ours[name].meta() for name in rule.ours))
            made |= {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in zip(rule.theirs, outs, strict=True)}
    return made, faults + [f"{name}: the format has no place for it" for name in ours if name not in used]


def differences(
    rules: Sequence[Rule], theirs: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Returns one line for each tensor that keeps `plan_import` from taking a file for this model; none: it fits."""
    ours = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    expected, faults = _exported_infos(rules, ours)
    optional = {name for rule in rules if rule.optional for name in rule.theirs}
    faults += [
        f"{name}: missing, must be {list(info.shape)}"
        for name, info in expected.items()
        if name not in theirs and name not in optional
    ]
    faults += [
        f"{name}: is {list(theirs[name].shape)}, must be {list(info.shape)}"
        for name, info in expected.items()
        if name in theirs and theirs[name].shape != info.shape
    ]
    weights = {name for rule in rules if rule.ours for name in rule.theirs}
    faults += [
        f"{name}: is {info.dtype}, must be of floating point"
        for name, info in theirs.items()
        if name in weights and not info.dtype.is_floating_point
    ]
    explained = expected.keys() | optional
    return faults + [
        f"{name}: {list(info.shape)} is not explained" for name, info in theirs.items() if name not in explained
    ]


def plan_import(
    rules: Sequence[Rule], theirs: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], path: Path | str
) -> dict[str, TensorInfo]:
    """Returns what an import makes: our names with shapes and dtypes; nothing is read.

    Args:
        theirs: what the file at `path` holds.
        shapes: our names and whole shapes, of the model that the file is taken for.

    Raises:
        CheckpointError: lists every tensor of theirs that is missing, left over, or of another shape than the model's.
    """
    faults = differences(rules, theirs, shapes)
    if faults:
        raise _not_explained(path, faults)
    made: dict[str, TensorInfo] = {}
    for rule in rules:
        if rule.ours and all(name in theirs for name in rule.theirs):
            outs = rule.transform.to_ours(*(theirs[name].meta() for name in rule.theirs))
            made |= {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in zip(rule.ours, outs, strict=True)}
    return made


def _not_explained(path: Path | str, faults: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fit this model and format, {len(faults)} differences:\n{listed(faults)}\n"
        "Every tensor must be explained on both sides; check that the variant and the format are the file's own."
    )


class Imported:
    """A source in their names as a source in ours, converted tensor by tensor as it is read (a `TensorSource`).

    Attributes:
        dropped: tensors of theirs that hold no weight of ours, under their names.
    """

    def __init__(self, source: TensorSource, rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Plans the import and checks the tensors that hold no weight.

        Raises:
            CheckpointError: as `plan_import`, or a tensor without weight contradicts the model.
        """
        self.path = source.path
        self.infos: Mapping[str, TensorInfo] = plan_import(rules, source.infos, shapes, source.path)
        self._source = source
        self._rules = {name: rule for rule in rules for name in rule.ours}
        holding = {name for rule in rules if rule.ours and rule.ours[0] in self.infos for name in rule.theirs}
        self.dropped = tuple(name for name in source.infos if name not in holding)
        for rule in rules:
            if not rule.ours and all(name in source.infos for name in rule.theirs) and rule.transform is not DROPPED:
                held = [source.read(name) for name in rule.theirs]
                try:
                    rule.transform.to_ours(*held)
                except CheckpointError as error:
                    raise CheckpointError(f"{source.path}: {error}") from None

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        rule = self._rules[name]
        made = rule.transform.to_ours(*(self._source.read(their_name) for their_name in rule.theirs))
        return made[rule.ours.index(name)]

    def close(self) -> None:
        """See `TensorSource.close`."""
        self._source.close()


def exported(rules: Sequence[Rule], source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Their tensors made from a source in our names, in the order and number of `plan_export`."""
    for rule in rules:
        if rule.written and all(name in source.infos for name in rule.ours):
            outs = _to_theirs(rule, source.infos, *(source.read(name) for name in rule.ours))
            yield from zip(rule.theirs, outs, strict=True)


def _to_theirs(rule: Rule, infos: Mapping[str, TensorInfo], *ours: Tensor) -> Tensors:
    made = rule.transform.to_theirs(*ours)
    like = None if rule.like is None else infos.get(rule.like)
    return made if like is None else tuple(tensor.to(like.dtype) for tensor in made)


def convert_state(
    rules: Sequence[Rule], state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Returns our tensors made from a state dict in memory: peers' modules in tests and benchmarks.

    Raises:
        CheckpointError: as `plan_import`.
    """
    source = Imported(StateSource(state), rules, shapes)
    return {name: source.read(name) for name in source.infos}


class StateSource:
    """A state dict in memory as a `TensorSource`."""

    path = Path("the state dict")

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()
        }

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        return self._state[name].detach().contiguous().clone()

    def close(self) -> None:
        """See `TensorSource.close`."""
