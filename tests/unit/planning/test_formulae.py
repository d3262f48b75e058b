"""The planner's formulae beside the towers themselves: parameters, FLOPs, what autograd keeps, who holds what."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megaeva.config.schema import Config, ModelSection, TextSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.model.init import init_weights
from megaeva.model.recompute import set_recompute
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import grid_of_one
from megaeva.planning import formulae as f
from megaeva.planning.estimate import plan
from megaeva.planning.formulae import Work
from megaeva.planning.gpus import GPUS
from megaeva.planning.topology import holdings
from tests.helpers.kept_bytes import kept_bytes
from tests.helpers.tiny import single_grid

# facts.md 1c: vision with its head, text.
FACTS = {
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304),
    "EVA02-CLIP-bigE-14": (4_350_556_928, 354_032_640),
    "EVA02-CLIP-bigE-14-plus": (4_350_556_928, 694_332_160),
    "EVA-CLIP-8B": (7_526_088_704, 694_659_840),
    "EVA-CLIP-8B-448": (7_529_234_432, 694_659_840),
    "EVA-CLIP-18B": (17_630_494_720, 694_987_520),
    "ViT-B-32": (87_849_216, 63_428_096),
    "ViT-B-16": (86_192_640, 63_428_096),
    "ViT-L-14": (303_966_208, 123_650_304),
    "ViT-L-14-336": (304_293_888, 123_650_304),
    "ViT-H-14": (632_076_800, 354_032_640),
    "ViT-bigG-14": (1_844_907_264, 694_659_840),
    "ViT-H-14-378-quickgelu": (632_682_240, 354_032_640),
}


@pytest.mark.parametrize("variant", FACTS)
def test_parameters_are_those_of_the_published_models(variant: str) -> None:
    model = ModelSection.model_validate(VARIANTS[variant])
    counts = tuple(f.tower_parameters(tower, model.embed_dim) for tower in (model.vision, model.text))
    assert counts == FACTS[variant]


def small(variant: str, **changes: Any) -> ModelSection:
    """The variant with two layers: all layers of a tower are alike."""
    model = ModelSection.model_validate(VARIANTS[variant])
    parts = {name: getattr(model, name).model_copy(update={"num_layers": 2} | changes) for name in ("vision", "text")}
    return model.model_copy(update=parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_pytorch_counts(variant: str) -> None:
    model = small(variant)
    for section in (model.vision, model.text):
        # QuickGELU's twins and shared text towers have the products of the first: each is counted once.
        counted = _counted(
            section.model_copy(update={"activation": section.activation.removeprefix("quick_")}), model.embed_dim
        )
        assert counted == pytest.approx(2 * _flops(section, model.embed_dim), rel=0.01)


@cache
def _counted(section: VisionSection | TextSection, embed_dim: int) -> int:
    """Of two samples, by FlopCounterMode."""
    grid = grid_of_one()
    with FlopCounterMode(display=False) as counter:
        if isinstance(section, VisionSection):
            image = torch.empty(2, 3, section.image_size, section.image_size, device="meta")
            out = VisionTower(section, embed_dim, grid=grid, device="meta")(image)
        else:
            text = TextTower(section, embed_dim, grid=grid, device="meta")
            # Megatron-core's own looks for a process group; neither has FLOPs.
            text.token_embedding = nn.Embedding(section.vocab_size, section.hidden_size, device="meta")
            words = torch.zeros(2, section.context_length, dtype=torch.long, device="meta")
            out = text.encode(words, words[:, 0], section.context_length)
        out.sum().backward()
    return counter.get_total_flops()


def _flops(section: VisionSection | TextSection, embed_dim: int) -> int:
    tokens = section.num_patches + 1 if isinstance(section, VisionSection) else section.context_length
    return f.tower_flops(section, tokens, embed_dim)[1]


# A tower of each kind: SwiGLU with inner norms and RoPE, post-norm, RMS, OpenAI's.
KINDS = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14", "EVA-CLIP-8B", "ViT-B-32-quickgelu")
_SIZES = {"image_size": 56, "patch_size": 14, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 176}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", KINDS)
def test_activations_are_what_autograd_keeps(variant: str, recompute: Any) -> None:
    """Bytes that six layers keep beyond three, of the CPU's operators in fp32: the ends are in both."""
    vision = ModelSection.model_validate(VARIANTS[variant]).vision.model_copy(update=_SIZES)
    kept = [_kept_bytes(vision.model_copy(update={"num_layers": layers}), recompute) for layers in (3, 6)]
    work = Work(17, 2, 1, False, "fp32", transformer_engine=False)
    expected = f.layer_input_bytes(vision, work)
    if recompute != "full":
        expected = f.layer_kept_bytes(vision, work, selective=recompute == "selective")
    assert (kept[1] - kept[0]) / 3 == pytest.approx(expected, rel=0.01)


def _kept_bytes(vision: VisionSection, recompute: Any) -> int:
    tower = VisionTower(vision, 32, grid=single_grid())
    init_weights(tower, seed=0, task="contrastive", grid=single_grid())
    set_recompute(tower, recompute)
    tower.train()
    return kept_bytes(tower, torch.zeros(2, 3, 56, 56))


LAYOUTS: tuple[dict[str, Any], ...] = (
    {"vision": {"tp": 8, "sequence_parallel": True}, "text": {"tp": 4}},
    {"vision": {"tp": 2, "pp": 4, "vpp": 3}, "text": {"tp": 5}},
    {"vision": {"tp": 4, "pp": 2, "layers_per_stage": [20, 28]}, "distributed_optimizer": False},
)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_rank_holds_what_the_topology_says(parallel: dict[str, Any]) -> None:
    variant = "EVA-CLIP-18B"
    cfg = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "unused",
            "model": {"variant": variant} | VARIANTS[variant],
            "data": {"train": ["unused"]},
            "optim": {"vision": {"lr": 1e-3}, "ema_decay": 0.99},
            "train": {"total_samples": 96000, "global_batch_size": 480, "micro_batch_size": 1},
            "parallel": parallel,
        }
    )
    held = holdings(cfg, 40)
    ours = plan(cfg, 40, GPUS["a100-40"])
    for stage, vision in zip(ours.stages, held["vision"], strict=True):
        (text,) = held["text"]
        assert stage.layers == vision.layers
        assert stage.parts["weights"] == vision.weight_bytes + text.weight_bytes
        assert stage.parts["gradients"] == vision.gradient_bytes + text.gradient_bytes
        assert stage.parts["optimizer"] == vision.optimizer_bytes + text.optimizer_bytes


def test_the_warmup_of_a_pipeline() -> None:
    assert [f.warmup_depth([10], 4, rank, 8) for rank in range(4)] == [40, 30, 20, 10]
    assert f.warmup_depth([10], 4, 0, 2) == 20, "never more than there are"
    # 2 (p - i - 1) + (v - 1) p passes of chunks, and one more.
    assert [f.warmup_depth([10, 10], 2, rank, 8) for rank in range(2)] == [50, 30]
    assert f.warmup_depth([10, 1], 2, 0, 8) == 4 * 10 + 1, "chunk 0 goes forward while chunk 1 goes back"
