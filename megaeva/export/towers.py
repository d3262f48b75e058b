"""Our towers with the weights of a file: whole, in fp32, on the CPU."""

from typing import TypeVar

import torch
from torch import nn

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.tensors import TensorSource
from megaeva.config.schema import AxesSection
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import start

Tower = TypeVar("Tower", bound=nn.Module)


def build_vision(source: TensorSource, what: Contents) -> VisionTower:
    """Returns the vision tower in evaluation mode; of kind mim it has no head.

    Args:
        source: in our names.
    """
    embed_dim = None if what.kind == "mim" else what.model.embed_dim
    tower = VisionTower(what.model.vision, embed_dim, grid=build_grid(AxesSection(), start("cpu")))
    return _filled(tower, "vision.", source)


def build_text(source: TensorSource, what: Contents) -> TextTower:
    """Returns the text tower of a kind clip in evaluation mode.

    Args:
        source: in our names.
    """
    tower = TextTower(what.model.text, what.model.embed_dim, grid=build_grid(AxesSection(), start("cpu")))
    return _filled(tower, "text.", source)


@torch.no_grad()
def _filled(tower: Tower, prefix: str, source: TensorSource) -> Tower:
    for name, parameter in tower.named_parameters():
        parameter.copy_(source.read(prefix + name))
    return tower.requires_grad_(False).eval()
