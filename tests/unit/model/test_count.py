"""Exact parameter counts of every variant: facts.md table 1c."""

import pytest

from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.model.count import count_parameters

# vision (with head), text, total (with the logit scale)
COUNTS = {
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912, 1_136_435_841),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640, 1_366_621_569),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096, 149_691_137),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304, 427_755_457),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304, 428_083_137),
    "EVA02-CLIP-bigE-14": (4_350_556_928, 354_032_640, 4_704_589_569),
    "EVA02-CLIP-bigE-14-plus": (4_350_556_928, 694_332_160, 5_044_889_089),
    "EVA-CLIP-8B": (7_526_088_704, 694_659_840, 8_220_748_545),
    "EVA-CLIP-8B-448": (7_529_234_432, 694_659_840, 8_223_894_273),
    "EVA-CLIP-18B": (17_630_494_720, 694_987_520, 18_325_482_241),
    # The paper gives no count: 18B plus the positions of 24 x 24 - 16 x 16 more patches of width 5120.
    "EVA-CLIP-18B-336": (
        17_630_494_720 + (24**2 - 16**2) * 5120, 694_987_520, 18_325_482_241 + (24**2 - 16**2) * 5120,
    ),
    "ViT-B-32-quickgelu": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B-16-quickgelu": (86_192_640, 63_428_096, 149_620_737),
    "ViT-B-32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B-16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L-14-quickgelu": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L-14-336-quickgelu": (304_293_888, 123_650_304, 427_944_193),
    "ViT-L-14": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L-14-336": (304_293_888, 123_650_304, 427_944_193),
    "ViT-H-14": (632_076_800, 354_032_640, 986_109_441),
    "ViT-bigG-14": (1_844_907_264, 694_659_840, 2_539_567_105),
    "ViT-H-14-quickgelu": (632_076_800, 354_032_640, 986_109_441),
    "ViT-H-14-378-quickgelu": (632_682_240, 354_032_640, 986_714_881),
}  # fmt: skip


@pytest.mark.parametrize("variant", COUNTS)
def test_published_counts(variant: str) -> None:
    counts = count_parameters(ModelSection.model_validate(VARIANTS[variant]))
    assert (counts["vision"], counts["text"], counts["total"]) == COUNTS[variant]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("Demo")])
def test_demo_counts(variant: str) -> None:
    """The demo's towers have no published count: theirs is added up from the shapes here."""
    cfg = ModelSection.model_validate(VARIANTS[variant])
    v, t = cfg.vision, cfg.text
    norm = 2 if v.norm == "layernorm" else 1
    qkv_bias = 3 * v.hidden_size if v.qkv_bias == "qkv" else 0
    vision_layer = (
        4 * v.hidden_size**2 + qkv_bias + v.hidden_size  # attention
        + 2 * v.hidden_size * v.ffn_hidden_size + v.ffn_hidden_size + v.hidden_size  # mlp
        + 2 * norm * v.hidden_size
    )  # fmt: skip
    vision = (
        v.num_layers * vision_layer
        + (3 * v.patch_size**2 + v.patch_bias) * v.hidden_size
        + (v.num_patches + 2) * v.hidden_size  # positions and cls
        + norm * v.hidden_size * (1 + v.ln_pre)
        + cfg.embed_dim * v.hidden_size
    )
    w = t.hidden_size
    text_layer = 4 * w**2 + 4 * w + 2 * w * t.ffn_hidden_size + t.ffn_hidden_size + w + 4 * w
    text = t.num_layers * text_layer + (t.vocab_size + t.context_length) * w + 2 * w + cfg.embed_dim * w
    counts = count_parameters(cfg)
    assert (counts["vision"], counts["text"], counts["total"]) == (vision, text, vision + text + 1)


def test_every_variant_is_counted() -> None:
    assert set(COUNTS) == {name for name in VARIANTS if not name.startswith("Demo")}
