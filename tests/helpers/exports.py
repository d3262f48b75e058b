"""Our models written through a format, and what comes back."""

from pathlib import Path

import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import MAX_SHARD_BYTES, Format
from megaeva.checkpoint.convert.rules import StateSource, convert_state, exported, plan_export
from megaeva.config.schema import ModelSection
from megaeva.model import CLIPModel, build_clip
from tests.helpers.tiny import full_shapes, load_full, random_state, single_grid


def random_clip(cfg: ModelSection) -> CLIPModel:
    """A CLIP with weights that hide nothing."""
    grid = single_grid()
    model = build_clip(cfg, vision_grid=grid, text_grid=grid).eval()
    load_full(model, random_state(full_shapes(model), seed=5), grid)
    return model


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters under the names of a checkpoint."""
    return {name: param.detach() for name, param in model.named_parameters()}


def export(style: Format, what: Contents, state: dict[str, Tensor], destination: Path) -> Path:
    """Writes `state`, in our names, as `megaeva convert` would."""
    assert style.refusal(what) is None
    source, rules = StateSource(state), style.rules(what, None)
    sink = style.open_sink(destination, what, plan_export(rules, source.infos, "ours"), MAX_SHARD_BYTES)
    for name, tensor in exported(rules, source):
        sink.write(name, tensor)
    sink.finish()
    return destination


def returned(style: Format, what: Contents, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` in our names again; `ours` says which shapes are meant."""
    assert style.recognises(theirs.keys())
    return convert_state(style.rules(what, theirs.keys()), theirs, {name: tuple(t.shape) for name, t in ours.items()})


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
