"""The bytes of activations that the planner expects of a rank are those that autograd keeps there.

Of one process tests/unit/planning/test_formulae.py says it at every run of the suite.
"""

from itertools import product
from typing import Any

import pytest
import torch

from megaeva.config.schema import AxesSection, ModelSection, TextSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.model.init import init_weights
from megaeva.model.recompute import set_recompute
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import build_grid
from megaeva.parallel.platform import DTYPES
from megaeva.parallel.runtime import Runtime
from megaeva.planning.formulae import Work
from megaeva.planning.tower import Tower
from tests.helpers.kept_bytes import kept_bytes
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.exhaustive

# A tower of each kind: SwiGLU with inner norms and RoPE, post-norm, RMS, OpenAI's; and a text tower.
KINDS = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14", "EVA-CLIP-8B", "ViT-B-32-quickgelu", "text")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "sp": {"tp": 2, "sequence_parallel": True},
    "sp full": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
    "tp selective": {"tp": 2, "recompute": "selective"},
    "tp first two": {"tp": 2, "recompute": 2},
}
_LAYERS, _BATCH, _EMBED = 6, 3, 32
_SIZES = {"hidden_size": 128, "num_heads": 8, "ffn_hidden_size": 352, "num_layers": _LAYERS}


def section(kind: str) -> VisionSection | TextSection:
    if kind == "text":
        text = ModelSection.model_validate(VARIANTS["ViT-B-32"]).text
        return text.model_copy(update=_SIZES | {"context_length": 20, "vocab_size": 64})
    vision = ModelSection.model_validate(VARIANTS[kind]).vision
    return vision.model_copy(update=_SIZES | {"image_size": 56, "patch_size": 14})


def kept_by(kind: str, axes: AxesSection, precision: Any, runtime: Runtime) -> int:
    """Of a tower's forward pass in this layout."""
    grid, part = build_grid(axes, runtime), section(kind)
    build: Any = VisionTower if isinstance(part, VisionSection) else TextTower
    tower = build(part, _EMBED, grid=grid, precision=precision)
    init_weights(tower, seed=0, task="contrastive", grid=grid)
    set_recompute(tower, axes.recompute)
    tower.train()
    if isinstance(part, VisionSection):
        return kept_bytes(tower, torch.zeros(_BATCH, 3, 56, 56, dtype=DTYPES[precision]))
    return kept_bytes(tower, torch.arange(20).expand(_BATCH, 20))  # the largest is the end


def measured(runtime: Runtime) -> dict[tuple[str, str, str], int]:
    cases = product(KINDS, LAYOUTS, ("fp32", "bf16"))
    return {case: kept_by(case[0], AxesSection(**LAYOUTS[case[1]]), case[2], runtime) for case in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str, str], int]]:
    return run_ranks(measured, 2)


@pytest.mark.parametrize("case", list(product(KINDS, LAYOUTS, ("fp32", "bf16"))), ids=" ".join)
def test_what_a_rank_keeps(case: tuple[str, str, Any], ranks: list[dict[tuple[str, str, str], int]]) -> None:
    kind, layout, precision = case
    part, axes = section(kind), AxesSection(**LAYOUTS[layout])
    tokens = part.num_patches + 1 if isinstance(part, VisionSection) else part.context_length
    work = Work(tokens, _BATCH, 2, axes.sequence_parallel, precision, transformer_engine=False)
    tower = Tower(kind, part, axes, _EMBED, 1, False, True, work, 1, None)
    for rank in ranks:
        assert rank[case] == pytest.approx(tower.kept[0], rel=0.01)
