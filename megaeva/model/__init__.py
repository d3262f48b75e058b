"""Towers on Megatron-core layers, and what is built from them."""

# Before anything here imports megatron.core: it guards that import against a broken Transformer Engine.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip

from megaeva.model.clip_model import CLIPModel, LogitScale, build_clip
from megaeva.model.count import count_parameters
from megaeva.model.init import init_weights
from megaeva.model.mim_student import MIMStudent
from megaeva.model.recompute import set_recompute
from megaeva.model.teacher import Teacher
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower

__all__ = [
    "CLIPModel",
    "LogitScale",
    "MIMStudent",
    "Teacher",
    "TextTower",
    "VisionTower",
    "build_clip",
    "count_parameters",
    "init_weights",
    "set_recompute",
]
