"""Shrunken towers give the outputs of open_clip and timm with the same random weights."""

from functools import partial
from typing import Any

import open_clip
import pytest
import timm.layers
import timm.models.eva
import torch
from torch import nn

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.eva import MIM, NATIVE
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.identify import published
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import StateSource, convert_state, exported, plan_export
from megaeva.checkpoint.convert.timm import TIMM
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.config.schema import ModelSection
from megaeva.config.variants import OPEN_CLIP_NAMES, VARIANTS
from megaeva.errors import CheckpointError
from megaeva.model import CLIPModel, MIMStudent, VisionTower, build_clip
from tests.helpers.exports import random_clip, state_of
from tests.helpers.tiny import example_images, example_tokens, full_shapes, load_full, random_state, single_grid, tiny

TOLERANCE = 1e-5  # fp32, outputs of order one


def _randomise(module: nn.Module) -> None:
    """All parameters, norms, biases, positions and cls token included."""
    state = random_state({name: param.shape for name, param in module.named_parameters()}, seed=3)
    module.load_state_dict(state, strict=False)


def _open_clip_model(cfg: ModelSection) -> Any:
    """open_clip's own towers at `cfg`'s sizes."""
    vision, text = cfg.vision, cfg.text
    quick = {vision.activation, text.activation} == {"quick_gelu"}
    model = open_clip.model.CLIP(
        cfg.embed_dim,
        {
            "layers": vision.num_layers, "width": vision.hidden_size, "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_heads, "image_size": vision.image_size,
            "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        },
        {
            "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_heads, "layers": text.num_layers,
        },
        quick_gelu=quick,
    )  # fmt: skip
    _randomise(model)
    return model.eval()


def _timm_trunk(cfg: ModelSection, **other: Any) -> Any:
    """timm's Eva with the arguments of its eva02_*_clip_224 entry points, at `cfg`'s sizes; `other` on top."""
    vision = cfg.vision
    flags: dict[str, Any] = {"use_post_norm": vision.norm_position == "post", "qkv_bias": vision.qkv_bias == "qv"}
    if vision.rope:
        flags |= {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True,
                  "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}  # fmt: skip
    if vision.norm == "rmsnorm":
        flags["norm_layer"] = partial(timm.layers.RmsNorm, eps=vision.norm_epsilon)
    trunk = timm.models.eva.Eva(
        img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.hidden_size,
        depth=vision.num_layers, num_heads=vision.num_heads, mlp_ratio=vision.ffn_hidden_size / vision.hidden_size,
        **{"num_classes": cfg.embed_dim, "global_pool": "token", **flags, **other},
    )  # fmt: skip
    _randomise(trunk)
    return trunk.eval()


def _converted(
    layout: Format, what: Contents, state: dict[str, torch.Tensor], shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    rules = layout.rules(what, state)
    return convert_state(rules, state, {name: tuple(shape) for name, shape in shapes.items()})


def _our_model(cfg: ModelSection, state: dict[str, torch.Tensor]) -> CLIPModel:
    grid = single_grid()
    model = build_clip(cfg, vision_grid=grid, text_grid=grid)
    load_full(model, _converted(OPEN_CLIP, Contents("clip", cfg), state, full_shapes(model)), grid)
    return model.eval()


def _our_tower(cfg: ModelSection, state: dict[str, torch.Tensor]) -> VisionTower:
    """From timm's names."""
    grid = single_grid()
    tower = VisionTower(cfg.vision, cfg.embed_dim, grid=grid)
    shapes = {f"vision.{name}": shape for name, shape in full_shapes(tower).items()}
    made = _converted(TIMM, Contents("vision", cfg), state, shapes)
    load_full(tower, {name.removeprefix("vision."): tensor for name, tensor in made.items()}, grid)
    return tower


@pytest.mark.parametrize(
    "variant", ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14", "ViT-bigG-14", "Demo-Teacher"]
)
@torch.no_grad()
def test_open_clip_towers(variant: str) -> None:
    cfg = tiny(variant)
    if variant == "Demo-Teacher":  # OpenAI-style vision; open_clip has one activation for both towers
        assert cfg.text.activation == cfg.vision.activation == "gelu"
    theirs = _open_clip_model(cfg)
    ours = _our_model(cfg, theirs.state_dict())
    image, token = example_images(cfg), example_tokens(cfg)
    expected = theirs.encode_image(image)
    assert expected.abs().max() > 0.5
    assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
    assert (ours.encode_text(token) - theirs.encode_text(token)).abs().max() < TOLERANCE
    assert ours.scale().item() == theirs.logit_scale.item()


def test_a_siglip_brings_its_bias() -> None:
    cfg = tiny("ViT-B-16-quickgelu")
    cfg = cfg.model_copy(update={"logit_scale": cfg.logit_scale.model_copy(update={"bias": -10.0})})
    state = _open_clip_model(cfg).state_dict()
    ours = _our_model(cfg, state | {"logit_bias": torch.tensor(-7.5)})
    assert ours.scale.logit_bias is not None and ours.scale.logit_bias.item() == -7.5
    with pytest.raises(CheckpointError, match=r"logit_bias: missing, must be \[\]"):
        _our_model(cfg, state)


@pytest.mark.parametrize(
    "variant",
    ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14", "EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14", "EVA02-CLIP-bigE-14-plus"],
)
@torch.no_grad()
def test_timm_trunks(variant: str) -> None:
    cfg = tiny(variant)
    trunk, text_side = _timm_trunk(cfg), _open_clip_model(cfg)
    # As open_clip's CustomTextCLIP names them.
    state = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    state |= {
        name if name == "logit_scale" else f"text.{name}": value
        for name, value in text_side.state_dict().items()
        if not name.startswith("visual.")
    }
    ours = _our_model(cfg, state)
    image, token = example_images(cfg), example_tokens(cfg)
    expected = trunk(image)
    assert expected.abs().max() > 0.5
    assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
    assert (ours.encode_text(token) - text_side.encode_text(token)).abs().max() < TOLERANCE
    # All tokens too: what a teacher shows its student.
    assert (ours.vision.tokens(image) - trunk.forward_features(image)).abs().max() < TOLERANCE


@torch.no_grad()
def test_from_timm_alone() -> None:
    cfg = tiny("EVA02-CLIP-L-14")
    trunk = _timm_trunk(cfg)
    tower = _our_tower(cfg, trunk.state_dict())
    image = example_images(cfg)
    assert (tower(image) - trunk(image)).abs().max() < TOLERANCE


def test_patch_dropout_gathers_rotary_angles() -> None:
    """Dropping patches = timm's forward on the kept tokens with their own angles."""
    cfg = tiny("EVA02-CLIP-L-14")
    trunk = _timm_trunk(cfg)
    tower = _our_tower(cfg, trunk.state_dict())
    image = example_images(cfg)
    keep_BK = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:7] for i in range(3)])
    with torch.no_grad():
        ours = tower(image, keep_BK)
        x, angles = trunk._pos_embed(trunk.patch_embed(image))
        for row in range(3):
            kept = torch.cat([torch.zeros(1, dtype=torch.long), keep_BK[row] + 1])
            hidden = x[row : row + 1, kept]
            for block in trunk.blocks:
                hidden = block(hidden, rope=angles[keep_BK[row]])
            expected = trunk.head(trunk.norm(hidden)[:, 0])
            assert (ours[row] - expected[0]).abs().max() < TOLERANCE
        assert (ours - tower(image)).abs().max() > 1e-2


@pytest.mark.parametrize("variant", OPEN_CLIP_NAMES)
def test_names_and_shapes_of_open_clip_at_full_size(variant: str) -> None:
    """On the meta device: what we write is what open_clip builds under its name, no more and no less."""
    arguments = open_clip.get_model_config(OPEN_CLIP_NAMES[variant])
    has_trunk = "timm_model_name" in arguments["vision_cfg"]
    arguments.pop("custom_text", None)
    build = open_clip.model.CustomTextCLIP if has_trunk else open_clip.model.CLIP
    with torch.device("meta"):
        theirs = build(**arguments)
    what = Contents("clip", published(variant))
    ours = {name: TensorInfo(shape, torch.float32) for name, shape in shapes(what).items()}
    written = plan_export(OPEN_CLIP.rules(what, None), ours, "ours")
    assert {name: info.shape for name, info in written.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }
    if has_trunk:
        trunk = theirs.visual.trunk.state_dict()
        what = Contents("vision", what.model)
        ours = {name: info for name, info in ours.items() if name.startswith("vision.")}
        assert plan_export(TIMM.rules(what, None), ours, "ours").keys() == trunk.keys()


EVA = [name for name in VARIANTS if name.startswith("EVA")]


@pytest.mark.parametrize("variant", EVA)
@torch.no_grad()
def test_eva_files_read_by_timm(variant: str) -> None:
    """Our export in EVA-CLIP's own names, through timm's reader of such files; no head bias there is one of zero."""
    cfg = tiny(variant)
    ours = random_clip(cfg)
    native = dict(exported(NATIVE.rules(Contents("clip", cfg), None), StateSource(state_of(ours))))
    trunk = _timm_trunk(cfg)
    trunk.head.bias.zero_()
    found = trunk.load_state_dict(timm.models.eva.checkpoint_filter_fn(native, trunk), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ([] if cfg.vision.head_bias else ["head.bias"])
    image = example_images(cfg)
    assert (ours.encode_image(image) - trunk(image)).abs().max() < TOLERANCE
    # The text names are those of an open_clip CustomTextCLIP.
    text_side = _open_clip_model(cfg)
    texts = {name.removeprefix("text."): tensor for name, tensor in native.items() if name.startswith("text.")}
    found = text_side.load_state_dict(texts, strict=False)
    assert found.unexpected_keys == [] and all(
        name.startswith(("visual.", "logit_scale")) for name in found.missing_keys
    )
    token = example_tokens(cfg)
    assert (ours.encode_text(token) - text_side.encode_text(token)).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", EVA)
@torch.no_grad()
def test_distilled_towers_read_by_timm(variant: str) -> None:
    """As asuka saves them: no inner norm in attention, mask token and lm_head beside the tower."""
    cfg = tiny(variant, sub_ln_attention=False)
    grid = single_grid()
    student = MIMStudent(cfg.vision, 12, grid=grid).eval()
    load_full(student, random_state(full_shapes(student), seed=5), grid)
    what = Contents("mim", cfg, teacher_dim=12)
    bare = dict(exported(MIM.rules(what, None), StateSource(state_of(student))))
    assert {"mask_token", "lm_head.weight", "lm_head.bias"} < bare.keys()
    # timm takes the norm for one behind the pooling, where it does the same to the cls token.
    trunk = _timm_trunk(cfg, num_classes=0, use_fc_norm=True, use_post_transformer_norm=False, scale_attn_inner=False)
    trunk.load_state_dict(timm.models.eva.checkpoint_filter_fn(bare, trunk), strict=True)
    image = example_images(cfg)
    assert (student.vision.tokens(image)[:, 0] - trunk(image)).abs().max() < TOLERANCE


def test_an_unexplained_tensor_is_an_error() -> None:
    cfg = tiny("ViT-H-14")
    state = _open_clip_model(cfg).state_dict()
    grid = single_grid()
    shapes = full_shapes(build_clip(cfg, vision_grid=grid, text_grid=grid))

    def refused(state: dict[str, torch.Tensor], shapes: dict[str, torch.Size], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            _converted(OPEN_CLIP, Contents("clip", cfg), state, shapes)

    refused(state | {"visual.surprise": torch.zeros(2)}, shapes, r"visual\.surprise: \[2\] is not explained")
    without = {name: tensor for name, tensor in state.items() if name != "ln_final.weight"}
    refused(without, shapes, r"ln_final\.weight: missing, must be \[48\]")
    refused(state, shapes | {"vision.surprise": torch.Size([1])}, r"vision\.surprise: the format has no place for it")
    other = shapes | {"vision.pos_embed": torch.Size([1, 5, 32])}
    refused(state, other, r"visual\.positional_embedding: is \[17, 32\], must be \[5, 32\]")
