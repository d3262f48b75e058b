"""Configuration beside weights: what is written is read back, what the peers wrote is understood or refused by name."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megaeva.checkpoint.convert import sidecar
from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.config.schema import ModelSection
from megaeva.config.variants import OPEN_CLIP_NAMES, VARIANTS
from megaeva.errors import CheckpointError
from tests.helpers.tiny import tiny

EVA_ONLY = {name for name in VARIANTS if name.startswith("EVA-CLIP-") or name == "Demo-Student"}
IMAGE = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")


def _full(variant: str) -> ModelSection:
    return ModelSection.model_validate(VARIANTS[variant])


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - EVA_ONLY))
def test_open_clip_config_comes_back(variant: str, tmp_path: Path) -> None:
    what = Contents("clip", _full(variant), IMAGE)
    assert sidecar.open_clip_refusal(what) is None
    sidecar.write_open_clip_config(tmp_path, what)
    assert sidecar.read_open_clip_config(tmp_path) == what
    assert sidecar.read_open_clip_config(tmp_path / "weights.bin") == what  # named by the file of weights


def test_what_open_clip_cannot_build() -> None:
    for variant in EVA_ONLY:
        assert "eva02_base_patch16_clip_224" in str(sidecar.open_clip_refusal(Contents("clip", _full(variant))))
    cfg = _full("ViT-B-32-quickgelu")
    mixed = cfg.model_copy(update={"text": cfg.text.model_copy(update={"activation": "gelu"})})
    assert "activation=gelu" in str(sidecar.open_clip_refusal(Contents("clip", mixed)))
    for key, value in {"qkv_bias": "qv", "head_bias": True, "rope": True, "norm_position": "post"}.items():
        other = cfg.model_copy(update={"vision": cfg.vision.model_copy(update={key: value})})
        assert key in str(sidecar.open_clip_refusal(Contents("clip", other)))


def test_open_clip_config_of_a_sigmoid_run_with_its_own_sizes(tmp_path: Path) -> None:
    cfg = tiny("ViT-bigG-14", norm_epsilon=2e-6)
    scale = cfg.logit_scale.model_copy(update={"bias": -10.0})
    what = Contents("clip", cfg.model_copy(update={"logit_scale": scale}), Preprocess(crop_share=0.875))
    sidecar.write_open_clip_config(tmp_path, what)
    assert sidecar.read_open_clip_config(tmp_path) == what
    assert "centre's 0.875" in sidecar.open_clip_notes(what)[0]


def test_open_clip_config_of_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    cfg = tiny("Demo-Teacher")
    what = Contents("clip", cfg, clip_ids=(0, 5, 49407))
    sidecar.write_open_clip_config(tmp_path, what)
    back = sidecar.read_open_clip_config(tmp_path)
    assert back is not None and back.clip_ids is None and back.model.text.vocab_size == 49408
    assert "3 of CLIP's 49,408 tokens" in sidecar.open_clip_notes(what)[0]


@pytest.mark.parametrize(("ours", "theirs"), sorted(OPEN_CLIP_NAMES.items()))
def test_open_clip_s_own_configs(ours: str, theirs: str, tmp_path: Path) -> None:
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    config = json.loads((Path(spec.origin).parent / "model_configs" / f"{theirs}.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert sidecar.read_open_clip_config(tmp_path) == Contents("clip", _full(ours))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model_cfg.vision_cfg.timm_model_name", "vit_base_patch16_siglip_256", "timm_model_name is 'vit_base"),
        ("model_cfg.vision_cfg.layers", [3, 4, 6, 3], r"layers is \[3, 4, 6, 3\]; it must be a number"),
        ("model_cfg.vision_cfg.no_ln_pre", True, "no_ln_pre is True; it must be False"),
        ("model_cfg.vision_cfg.ls_init_value", 1e-4, "ls_init_value is 0.0001; it must be absent"),
        ("model_cfg.vision_cfg.image_size", [224, 112], "image_size"),
        ("model_cfg.text_cfg.hf_model_name", "roberta-base", "hf_model_name"),
        ("model_cfg.text_cfg.pool_type", "last", "pool_type is 'last'; it must be 'argmax'"),
        ("model_cfg.text_cfg.norm_kwargs", {"eps": 1e-5, "bias": False}, "norm_kwargs.bias"),
        ("model_cfg.text_cfg.width", "wide", "width is 'wide'; it must be a number"),
        ("model_cfg.multimodal_cfg", {"width": 1}, "multimodal_cfg"),
        ("model_cfg.quick_gelu", "yes", "quick_gelu is 'yes'; it must be False or True"),
        ("preprocess_cfg.resize_mode", "longest", "resize_mode is 'longest'"),
        ("preprocess_cfg.mean", [0.5], r"mean is \[0.5\]; it must be three numbers"),
        ("model_cfg.vision_cfg", None, "embed_dim"),
        ("model_cfg", [], "model_cfg is a list|must be an object"),
    ],
)
def test_an_open_clip_config_that_is_not_ours(where: str, value: Any, message: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(sidecar.open_clip_config(Contents("clip", _full("ViT-H-14")))))
    *parents, key = where.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    section[key] = value
    if value is None:
        del content["model_cfg"]["embed_dim"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as error:
        sidecar.read_open_clip_config(tmp_path)
    assert "open_clip_config.json" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"must be .*JSON"):
        sidecar.read_open_clip_config(tmp_path)
    assert sidecar.read_open_clip_config(tmp_path / "elsewhere" / "weights.pt") is None


TIMM = ["EVA01-CLIP-g-14", "EVA02-CLIP-B-16", "EVA02-CLIP-L-14", "EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14"]


@pytest.mark.parametrize("variant", TIMM)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_timm_config_comes_back(variant: str, size: str, tmp_path: Path) -> None:
    model = _full(variant) if size == "full" else tiny(variant)
    what = Contents("vision", model.model_copy(update={"text": sidecar.NO_TEXT}), replace(IMAGE, crop_share=0.9))
    assert sidecar.timm_refusal(what) is None
    sidecar.write_timm_config(tmp_path, what)
    assert sidecar.read_timm_config(tmp_path) == what


def test_the_config_that_timm_saves(tmp_path: Path) -> None:
    """It repeats classes and channels among the arguments."""
    import timm

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4, "ref_feat_shape": 4}
    tower = timm.create_model("eva02_base_patch16_clip_224", num_classes=40, **arguments)
    timm.models.save_for_hf(tower, tmp_path, model_args=arguments)
    what = sidecar.read_timm_config(tmp_path)
    assert what is not None and what.model.embed_dim == 40 and what.model.vision.hidden_size == 96
    assert (what.model.vision.image_size, what.model.vision.rope_pretrain_grid) == (32, 4)


def test_a_ratio_gives_the_hidden_size_back() -> None:
    """Both peers compute int(width * ratio), which loses one where the product comes out a hair below."""
    sizes = [(width, hidden) for width in range(16, 160) for hidden in range(width, 6 * width, 7)]
    assert any(int(width * (hidden / width)) != hidden for width, hidden in sizes)
    assert all(int(width * sidecar.mlp_ratio(width, hidden)) == hidden for width, hidden in sizes)


def test_what_timm_cannot_build(tmp_path: Path) -> None:
    assert "norm=layernorm" in str(sidecar.timm_refusal(Contents("vision", _full("EVA-CLIP-18B"))))
    assert "norm_epsilon" in str(sidecar.timm_refusal(Contents("vision", _full("ViT-H-14"))))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # another library's
    assert sidecar.read_timm_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"architecture": "resnet50", "num_classes": 10}')
    with pytest.raises(CheckpointError, match="architecture is 'resnet50'"):
        sidecar.read_timm_config(tmp_path)
    content = sidecar.timm_config(Contents("vision", tiny("EVA02-CLIP-B-16")))
    content["model_args"]["num_reg_tokens"] = 4
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model_args\.num_reg_tokens is 4"):
        sidecar.read_timm_config(tmp_path)


def test_contents_of_a_run_come_back(tmp_path: Path) -> None:
    for what in (
        Contents("clip", tiny("Demo-Teacher"), IMAGE, clip_ids=(0, 7, 49407), source=tmp_path),
        Contents("mim", tiny("EVA-CLIP-18B"), teacher_dim=48, source=tmp_path),
    ):
        info = json.loads(json.dumps(sidecar.contents_info(what)))
        assert sidecar.info_contents(tmp_path, info) == what
        for key, value in {
            "kind": "x",
            "preprocess": None,
            "clip_ids": [3, 1],
            "teacher_dim": "8",
            "model": {},
        }.items():
            with pytest.raises(CheckpointError, match=r"megaeva\.json"):
                sidecar.info_contents(tmp_path, info | {key: value})
