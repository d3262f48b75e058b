"""The table of parameter names: upstream's layer decay and no-decay set."""

import pytest
import torch

from megaeva.config.schema import OptimSection, TowerOptimSection
from megaeva.optim.param_groups import find_rule, param_groups

OPTIM = OptimSection(
    vision=TowerOptimSection(lr=4e-4, layer_decay=0.9),
    text=TowerOptimSection(lr=4e-5, layer_decay=0.75),
    logit_scale_lr=5e-4,
    weight_decay=0.05,
)


def _block(index: int, width: int = 4) -> dict[str, tuple[int, ...]]:
    block = f"blocks.layers.{index}."
    return {
        block + "input_layernorm.weight": (width,),
        block + "self_attention.linear_qkv.weight": (3 * width, width),
        block + "self_attention.linear_qkv.bias": (3 * width,),
        block + "self_attention.q_bias": (width,),
        block + "self_attention.inner_norm.weight": (width,),
        block + "self_attention.linear_proj.weight": (width, width),
        block + "post_attention_layernorm.bias": (width,),
        block + "mlp.linear_fc1.weight": (4 * width, width),
        block + "mlp.linear_fc1.layer_norm_weight": (width,),
        block + "mlp.inner_norm.bias": (width,),
        block + "mlp.linear_fc2.bias": (width,),
    }


VISION = {
    "patch_embed.weight": (4, 3, 2, 2),
    "patch_embed.bias": (4,),
    "cls_token": (1, 1, 4),
    "pos_embed": (1, 5, 4),
    "ln_pre.weight": (4,),
    **_block(0),
    **_block(1),
    "norm.weight": (4,),
    "head.weight": (6, 4),
    "head.bias": (6,),
}
TEXT = {"token_embedding.weight": (9, 4), "pos_embed": (7, 4), **_block(0), "norm.bias": (4,), "head.weight": (6, 4)}


def _settings(
    tower: str, shapes: dict[str, tuple[int, ...]], num_blocks: int | None = None
) -> dict[str, tuple[float, float]]:
    """{name: (learning rate / tower's peak, weight decay)}"""
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {id(p): name for name, p in named.items()}
    groups = param_groups(tower, named.items(), OPTIM, num_blocks)
    found = {names[id(p)]: (group["lr_mult"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == shapes.keys()
    assert len(groups) == len({(group["lr_mult"], group["wd_mult"]) for group in groups})
    return found


def test_vision_layer_decay() -> None:
    found = {name: scale for name, (scale, _) in _settings("vision", VISION).items()}
    for name in ("patch_embed.weight", "patch_embed.bias", "cls_token", "pos_embed"):
        assert found[name] == pytest.approx(0.9**3)
    for name in VISION:
        if name.startswith("blocks.layers.0."):
            assert found[name] == pytest.approx(0.9**2)
        if name.startswith("blocks.layers.1."):
            assert found[name] == pytest.approx(0.9)
    for name in ("ln_pre.weight", "norm.weight", "head.weight", "head.bias"):
        assert found[name] == 1.0


def test_18b_embeddings_have_the_published_scale() -> None:
    shapes = {"cls_token": (1, 1, 4)} | {f"blocks.layers.{i}.mlp.linear_fc1.bias": (4,) for i in range(48)}
    assert _settings("vision", shapes)["cls_token"][0] == pytest.approx(0.0057, abs=5e-5)


def test_a_pipeline_stage_counts_the_blocks_of_the_whole_tower() -> None:
    whole = _settings("vision", VISION)
    first = {name: shape for name, shape in VISION.items() if not name.startswith(("blocks.layers.1.", "norm", "head"))}
    last = {name: shape for name, shape in VISION.items() if name not in first}
    assert first and last
    for stage in (first, last):
        assert _settings("vision", stage, num_blocks=2) == {name: whole[name] for name in stage}
    assert _settings("vision", first) != {name: whole[name] for name in first}


def test_text_has_its_own_decay_and_decays_the_token_embedding() -> None:
    found = _settings("text", TEXT)
    assert found["token_embedding.weight"] == (pytest.approx(0.75**2), 0.05)
    assert found["pos_embed"] == (pytest.approx(0.75**2), 0.0)
    assert found["head.weight"] == (1.0, 0.05)


def test_only_matrices_are_decayed() -> None:
    for name, (_, decay) in _settings("vision", VISION).items():
        expected = name.endswith(".weight") and "norm" not in name and not name.startswith("ln_pre")
        assert decay == (0.05 if expected else 0.0), name


def test_student_reads_its_tower_under_a_prefix_and_decays_the_mask_token() -> None:
    shapes = {f"vision.{name}": shape for name, shape in VISION.items()}
    shapes |= {"mask_token": (1, 1, 4), "lm_head.weight": (6, 4), "lm_head.bias": (6,)}
    found = _settings("student", shapes)
    assert found["vision.blocks.layers.1.mlp.linear_fc1.weight"] == (pytest.approx(0.9), 0.05)
    assert found["mask_token"] == (pytest.approx(0.9**3), 0.05)
    assert found["lm_head.weight"] == (1.0, 0.05)


def test_logit_scale_and_bias_have_their_own_rate() -> None:
    named = [(name, torch.nn.Parameter(torch.zeros(()))) for name in ("log_scale", "logit_bias")]
    (group,) = param_groups("scale", named, OPTIM)
    assert len(group["params"]) == 2
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.0)


def test_frozen_parameters_are_left_out_and_dtypes_kept_apart() -> None:
    named = {name: torch.nn.Parameter(torch.zeros(shape), name != "head.weight") for name, shape in VISION.items()}
    named["norm.weight"].data = named["norm.weight"].data.bfloat16()
    groups = param_groups("vision", named.items(), OPTIM)
    assert all(p.requires_grad for group in groups for p in group["params"])
    assert all(len({p.dtype for p in group["params"]}) == 1 for group in groups)


@pytest.mark.parametrize("name", ["blocks.layers.0.mlp.router.weight", "head_2.weight", "blocks.layers.x.norm.weight"])
def test_a_name_outside_the_table_is_an_error(name: str) -> None:
    with pytest.raises(LookupError, match=name):
        param_groups("vision", [(name, torch.nn.Parameter(torch.zeros(2, 2)))], OPTIM)


def test_rules_do_not_overlap() -> None:
    for name in [*VISION, *TEXT, "log_scale", "mask_token", "vision.norm.bias"]:
        find_rule(name)
