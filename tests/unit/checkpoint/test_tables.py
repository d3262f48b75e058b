"""The tables of names: ours by arithmetic, EVA's, timm's and open_clip's both ways, and which file is which."""

import math

import pytest

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.ours import shapes
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.model import MIMStudent, VisionTower, build_clip
from megaeva.parallel.grid import grid_of_one
from tests.helpers.tiny import full_shapes, tiny
from tests.unit.model.test_count import COUNTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_shapes_are_the_built_models(variant: str) -> None:
    cfg, grid = tiny(variant), grid_of_one()
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    assert shapes(Contents("clip", cfg)) == full_shapes(clip)
    tower = VisionTower(cfg.vision, cfg.embed_dim, grid=grid, device="meta")
    assert shapes(Contents("vision", cfg)) == {f"vision.{n}": s for n, s in full_shapes(tower).items()}
    student = MIMStudent(cfg.vision, 12, grid=grid, device="meta")
    assert shapes(Contents("mim", cfg, teacher_dim=12)) == full_shapes(student)


def test_shapes_of_a_siglip() -> None:
    cfg, grid = tiny("ViT-B-16"), grid_of_one()
    cfg = cfg.model_copy(update={"logit_scale": cfg.logit_scale.model_copy(update={"bias": -10.0})})
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    assert shapes(Contents("clip", cfg)) == full_shapes(clip)


@pytest.mark.parametrize("variant", COUNTS)
def test_our_shapes_add_up_to_the_published_counts(variant: str) -> None:
    made = shapes(Contents("clip", ModelSection.model_validate(VARIANTS[variant])))

    def total(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in made.items() if name.startswith(prefix))

    assert (total("vision."), total("text."), total("")) == COUNTS[variant]
