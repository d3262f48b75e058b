"""Fresh weights: deviations of the table, starts of the two tasks, independence of where a tower sits."""

import math

import pytest
import torch
from torch import Tensor, nn

from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.model import MIMStudent, VisionTower, build_clip, init_weights
from tests.helpers.tiny import single_grid, tiny


def _clip(cfg: ModelSection, seed: int = 0) -> dict[str, Tensor]:
    grid = single_grid()
    model = build_clip(cfg, vision_grid=grid, text_grid=grid)
    init_weights(model, seed=seed, task="contrastive", grid=grid)
    return {name: param.detach() for name, param in model.named_parameters()}


def test_eva_deviations() -> None:
    weights = _clip(ModelSection.model_validate(VARIANTS["Demo-Student"]))
    layer = "vision.blocks.layers.{}.".format
    for name, expected in {
        "vision.patch_embed.weight": 0.02,
        "vision.pos_embed": 0.02,
        layer(3) + "self_attention.linear_qkv.weight": 0.02,
        layer(0) + "self_attention.linear_proj.weight": 0.02 / 2**0.5,
        layer(3) + "self_attention.linear_proj.weight": 0.02 / 8**0.5,
        layer(5) + "mlp.linear_fc2.weight": 0.02 / 12**0.5,
        "vision.head.weight": 0.02,
        "text.token_embedding.weight": 0.02,
        "text.pos_embed": 0.01,
        "text.blocks.layers.0.self_attention.linear_qkv.weight": 96**-0.5,
        "text.blocks.layers.1.self_attention.linear_proj.weight": 96**-0.5 / 2,
        "text.blocks.layers.1.mlp.linear_fc1.weight": (2 * 96) ** -0.5,
        "text.head.weight": 96**-0.5,
    }.items():
        value = weights[name]
        assert value.std().item() == pytest.approx(expected, rel=4 / value.numel() ** 0.5), name
    for name, value in weights.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
    assert weights["scale.log_scale"].item() == pytest.approx(2.6592600369327783)


def test_distillation_of_sub_ln_towers_starts_from_xavier() -> None:
    cfg = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"]).vision.model_copy(update={"num_layers": 2})
    grid = single_grid()
    student = MIMStudent(cfg, 1024, grid=grid)
    init_weights(student, seed=0, task="mim", grid=grid)
    weights = {name: param.detach() for name, param in student.named_parameters()}
    layer, gain = "vision.blocks.layers.1.", math.log(4) ** 0.5
    qkv = weights[layer + "self_attention.linear_qkv.weight"].view(12, 3, 64, 768)
    for value, expected in (
        (qkv[:, 0], 768**-0.5),
        (qkv[:, 1], 768**-0.5),
        (qkv[:, 2], 768**-0.5 * gain),
        (weights[layer + "self_attention.linear_proj.weight"], 768**-0.5 * gain),
        (weights[layer + "mlp.linear_fc1.weight"], (2 / (768 + 2048)) ** 0.5 * gain),
        (weights[layer + "mlp.linear_fc2.weight"], (2 / (768 + 2048)) ** 0.5 * gain),
        (weights["lm_head.weight"], (2 / (768 + 1024)) ** 0.5),
        (weights["vision.patch_embed.weight"], (2 / (768 + 3 * 16 * 16)) ** 0.5),
        (weights["vision.pos_embed"], 0.02),
    ):
        assert value.std().item() == pytest.approx(expected, rel=4 / value.numel() ** 0.5)


def test_distillation_starts_post_norm_layers_as_the_identity() -> None:
    cfg = tiny("EVA02-CLIP-bigE-14").vision
    grid = single_grid()
    student = MIMStudent(cfg, 20, grid=grid)
    init_weights(student, seed=0, task="mim", grid=grid)
    patches = student.vision.embed(torch.randn(2, 3, 16, 16))
    with_positions = patches + student.vision.pos_embed[0, 1:, None]
    assert torch.equal(student.vision.encode(patches)[1:], with_positions)
    assert student.vision.norm.weight.eq(1).all()  # the final norm is not part of it
    tower = VisionTower(cfg, 20, grid=grid)
    init_weights(tower, seed=0, task="contrastive", grid=grid)
    assert (tower.blocks.layers["0"].post_mlp_layernorm.weight == 1).all()


def test_weights_depend_on_seed_and_name_only() -> None:
    cfg = tiny("EVA-CLIP-8B")  # pre-norm, no sub-LN: both tasks start it alike
    grid = single_grid()
    clip = _clip(cfg)
    student = MIMStudent(cfg.vision, 20, grid=grid)
    init_weights(student, seed=0, task="mim", grid=grid)
    for name, param in student.vision.named_parameters():
        assert torch.equal(param, clip[f"vision.{name}"]), name
    assert not torch.equal(_clip(cfg, seed=1)["vision.cls_token"], clip["vision.cls_token"])
    torch.manual_seed(99)  # and not on the global generator
    assert torch.equal(_clip(cfg)["vision.cls_token"], clip["vision.cls_token"])
    first, second = (clip[f"vision.blocks.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_every_variant_has_a_row(variant: str) -> None:
    cfg = tiny(variant)
    assert all(value.isfinite().all() for value in _clip(cfg).values())
    grid = single_grid()
    student = MIMStudent(cfg.vision, 20, grid=grid)
    nn.init.constant_(student.mask_token, torch.nan)
    init_weights(student, seed=0, task="mim", grid=grid)
    assert all(param.isfinite().all() for param in student.parameters())


def test_a_parameter_without_a_row_is_an_error() -> None:
    grid = single_grid()
    tower = VisionTower(tiny("ViT-H-14").vision, 20, grid=grid)
    tower.surprise = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(AssertionError, match="no row of the initialisation table matches surprise"):
        init_weights(tower, seed=0, task="contrastive", grid=grid)
    with pytest.raises(AssertionError, match="parameters of no known tower"):
        init_weights(nn.Linear(2, 2), seed=0, task="contrastive", grid=grid)
