"""Conversion as tables: each row says which of their tensors make one of ours, and how.

"Ours" is the state dict of a tower with tp=1 (`CLIPModel` prefixes "vision.", "text.", "scale."). A table is checked
against what it is applied to: a tensor of theirs that no row takes, or of ours that no row makes, is an error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaeva.errors import CheckpointError

Transform = Callable[..., Tensor]


@dataclass(frozen=True)
class Rule:
    """One row: `target` is made by `transform(*sources)`. `{i}` in the names stands for the layer's number."""

    target: str
    sources: tuple[str, ...]
    transform: Transform


def same(tensor: Tensor) -> Tensor:
    """Returns the tensor as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Returns x @ W's W as a linear layer's weight."""
    return tensor.t().contiguous()


def as_cls_token(tensor: Tensor) -> Tensor:
    """Returns a class embedding [D] as [1, 1, D]."""
    return tensor.view(1, 1, -1)


def with_batch_dim(tensor: Tensor) -> Tensor:
    """Returns positions [N+1, D] as [1, N+1, D]."""
    return tensor.unsqueeze(0)


def stacked(*tensors: Tensor) -> Tensor:
    """Returns [w1; w2], a gated weight or bias."""
    return torch.cat(tensors)


def interleaved(num_heads: int) -> Transform:
    """Returns the transform from [q; k; v], one tensor or three, to mcore's rows [q, k, v] of head 0, of head 1, ..."""

    def transform(*tensors: Tensor) -> Tensor:
        full = torch.cat(tensors)
        width = full.shape[0] // (3 * num_heads)
        return full.view(3, num_heads, width, *full.shape[1:]).transpose(0, 1).reshape(full.shape)

    return transform


def copies(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Returns rows that only rename: (ours, theirs)."""
    return [Rule(ours, (theirs,), same) for ours, theirs in pairs]


def both(ours: str, theirs: str, has_bias: bool = True) -> list[Rule]:
    """Returns the renaming of a module's weight and, where it has one, bias."""
    return copies((f"{ours}.{p}", f"{theirs}.{p}") for p in (("weight", "bias") if has_bias else ("weight",)))


def for_layers(rules: Sequence[Rule], num_layers: int) -> list[Rule]:
    """Returns the rows of one layer for all layers."""
    return [
        replace(rule, target=rule.target.format(i=i), sources=tuple(s.format(i=i) for s in rule.sources))
        for i in range(num_layers)
        for rule in rules
    ]


def prefixed(rules: Sequence[Rule], ours: str, theirs: str) -> list[Rule]:
    """Returns the rows with a prefix before the names of either side."""
    return [
        replace(rule, target=ours + rule.target, sources=tuple(theirs + source for source in rule.sources))
        for rule in rules
    ]


def convert(
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """Returns our state dict made from theirs.

    Args:
        expected: names and full (tp=1) shapes of our parameters.
        ignore: true of their names that hold no weight (masks, angle tables).

    Raises:
        CheckpointError: lists every tensor that is missing, left over, or of another shape.
    """
    faults: list[str] = []
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules:
        missing = [name for name in rule.sources if name not in state]
        if missing:
            faults.append(f"missing {', '.join(missing)} for {rule.target}")
            continue
        used.update(rule.sources)
        made[rule.target] = rule.transform(*(state[name] for name in rule.sources))
    faults += [
        f"left over: {name} {tuple(state[name].shape)}" for name in state if name not in used and not ignore(name)
    ]
    faults += [f"nothing makes {name} {tuple(shape)}" for name, shape in expected.items() if name not in made]
    for name, tensor in made.items():
        if name not in expected:
            faults.append(f"the model has no {name}")
        elif tensor.shape != expected[name]:
            faults.append(f"{name} comes out as {tuple(tensor.shape)} and must be {tuple(expected[name])}")
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"these weights do not fit this model, {len(faults)} differences:\n  {shown}\n"
            "Every tensor must be explained on both sides; check that model.variant names the weights' own variant."
        )
    return made
