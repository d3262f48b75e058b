"""transformers loads our Hugging Face exports unchanged: weights, outputs, images and captions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.hf import HF_CLIP, HF_EVA
from megaeva.config.schema import ModelSection
from megaeva.data.tokenizer import Tokenizer
from megaeva.errors import CheckpointError
from tests.helpers.exports import assert_same_bits, export, random_clip, returned, state_of
from tests.helpers.tiny import example_images, example_tokens, tiny

TOLERANCE = 1e-5  # fp32, outputs of order one


def _clip(variant: str) -> ModelSection:
    """Tiny, with what could be confused set apart: activations, epsilons."""
    cfg = tiny(variant, norm_epsilon=3e-5)
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[cfg.vision.activation]
    return cfg.model_copy(update={"text": cfg.text.model_copy(update={"activation": other, "norm_epsilon": 2e-5})})


@pytest.mark.parametrize("variant", ["ViT-B-32-quickgelu", "ViT-H-14"])
@torch.no_grad()
def test_clip_model_gives_our_outputs(variant: str, tmp_path: Path) -> None:
    what = Contents("clip", _clip(variant), Preprocess(resize="squash", interpolation="bilinear"))
    ours = random_clip(what.model)
    folder = export(HF_CLIP, what, state_of(ours), tmp_path / "hf")
    theirs, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    image, token = example_images(what.model), example_tokens(what.model)
    expected = theirs.eval().get_image_features(pixel_values=image).pooler_output
    assert expected.abs().max() > 0.5
    assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
    text = theirs.get_text_features(input_ids=token).pooler_output
    assert (ours.encode_text(token) - text).abs().max() < TOLERANCE
    assert theirs.logit_scale.item() == ours.scale.log_scale.item()

    assert HF_CLIP.read_config(folder) == what
    assert_same_bits(returned(HF_CLIP, what, load_file(folder / "model.safetensors"), state_of(ours)), state_of(ours))


@pytest.mark.parametrize("variant", ["EVA01-CLIP-g-14", "EVA-CLIP-8B"])
@torch.no_grad()
def test_eva_against_transformers_with_other_parts(variant: str, tmp_path: Path) -> None:
    """The remote code is not here: transformers' CLIP with the parts in which EVA's pre-norm towers differ."""
    what = Contents("clip", tiny(variant))
    ours = random_clip(what.model)
    folder = export(HF_EVA, what, state_of(ours), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(**{k: config[k] for k in ("projection_dim", "vision_config", "text_config")})
    ).eval()
    vision, width = theirs.vision_model, what.model.vision.hidden_size
    vision.pre_layrnorm = nn.Identity()
    vision.embeddings.patch_embedding = nn.Conv2d(3, width, 4, 4)
    theirs.visual_projection = nn.Linear(width, what.model.embed_dim, bias=what.model.vision.head_bias)
    flags = config["vision_config"]
    assert not flags["post_layernorm"]
    if flags["use_rms_norm"]:
        epsilon = flags["layer_norm_eps"]
        vision.post_layernorm = nn.RMSNorm(width, epsilon)
        for layer in vision.encoder.layers:
            layer.layer_norm1, layer.layer_norm2 = nn.RMSNorm(width, epsilon), nn.RMSNorm(width, epsilon)
    for layer in vision.encoder.layers:
        for part in "qkv":
            getattr(layer.self_attn, f"{part}_proj").register_parameter("bias", None)
            if flags[f"{part}_bias"]:
                getattr(layer.self_attn, f"{part}_proj").bias = nn.Parameter(torch.empty(width))
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    image, token = example_images(what.model), example_tokens(what.model)
    expected = theirs.get_image_features(pixel_values=image).pooler_output
    assert expected.abs().max() > 0.5
    assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
    text = theirs.get_text_features(input_ids=token).pooler_output
    assert (ours.encode_text(token) - text).abs().max() < TOLERANCE


_EVA = ["EVA01-CLIP-g-14", "EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "Demo-Student"]


@pytest.mark.parametrize("variant", _EVA)
def test_eva_comes_back_as_it_went(variant: str, tmp_path: Path) -> None:
    what = Contents("clip", tiny(variant))
    state = state_of(random_clip(what.model))
    folder = export(HF_EVA, what, state, tmp_path / "hf")
    theirs = load_file(folder / "model.safetensors")
    assert HF_EVA.read_config(folder) == what
    assert_same_bits(returned(HF_EVA, what, theirs, state), state)
    layer = "vision_model.encoder.layers.1."
    cfg = what.model.vision
    assert (layer + "self_attn.q_proj.bias" in theirs) == (cfg.qkv_bias == "qv")
    assert (layer + "self_attn.inner_attn_ln.weight" in theirs) == cfg.sub_ln_attention
    assert (layer + "mlp.fc3.weight" in theirs) == (cfg.activation == "swiglu")
    assert (layer + "layer_norm1.bias" in theirs) == (cfg.norm == "layernorm")
    if cfg.activation == "swiglu":  # fc1 is w1, which goes through SiLU [facts.md 2c, 2d]
        w1, w2 = state["vision.blocks.layers.1.mlp.linear_fc1.weight"].chunk(2)
        assert torch.equal(theirs[layer + "mlp.fc1.weight"], w1) and torch.equal(theirs[layer + "mlp.fc2.weight"], w2)
    if cfg.qkv_bias == "qv":
        bias = layer + "self_attn.k_proj.bias"
        assert_same_bits(returned(HF_EVA, what, theirs | {bias: torch.zeros(32)}, state), state)
        with pytest.raises(CheckpointError, match=r"k_proj\.bias is not zero"):
            returned(HF_EVA, what, theirs | {bias: torch.ones(32)}, state)


def test_a_config_that_leaves_the_norms_open_says_nothing(tmp_path: Path) -> None:
    what = Contents("clip", tiny("EVA-CLIP-18B"))
    folder = export(HF_EVA, what, state_of(random_clip(what.model)), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["post_layernorm"]
    (folder / "config.json").write_text(json.dumps(config))
    assert HF_EVA.read_config(folder) is None


def test_formats_refuse_the_other_style() -> None:
    assert "try hf-eva" in str(HF_CLIP.refusal(Contents("clip", tiny("EVA02-CLIP-B-16"))))
    assert "try hf-clip" in str(HF_EVA.refusal(Contents("clip", tiny("ViT-H-14"))))
    cfg = tiny("ViT-H-14")
    cfg = cfg.model_copy(update={"logit_scale": cfg.logit_scale.model_copy(update={"bias": -10.0})})
    assert "no bias of the logits" in str(HF_CLIP.refusal(Contents("clip", cfg)))


CAPTIONS = [
    "a photo of a dog.", "Smiling Face With Heart-Eyes!!", "two  spaces\tand a tab", "naïve café — 数字 123",
    "it's we'll", "xylophonist's " * 30,
]  # fmt: skip


@torch.no_grad()
def test_images_and_captions_of_a_trained_part_of_the_vocabulary(tmp_path: Path) -> None:
    """A run over a part of CLIP's vocabulary: its rows lie at CLIP's ids, theirs reads our captions as ours does."""
    subset = tmp_path / "vocab.json"
    from megaeva.data.tokenizer import build_subset

    content: dict[str, Any] = build_subset(CAPTIONS)
    subset.write_text(json.dumps(content))
    tokenizer = Tokenizer(24, subset)
    cfg = tiny("Demo-Teacher", image_size=48, patch_size=12)
    text = cfg.text.model_copy(update={"context_length": 24, "vocab_size": tokenizer.vocab_size + 5})
    what = Contents("clip", cfg.model_copy(update={"text": text}), clip_ids=tuple(content["clip_ids"]))
    ours = random_clip(what.model)
    folder = export(HF_CLIP, what, state_of(ours), tmp_path / "hf")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, transformers.CLIPProcessor)

    batch = processor(text=CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    ids = Tokenizer(24)(CAPTIONS)
    seen = batch["attention_mask"].bool()
    assert batch["input_ids"].shape == ids.shape and torch.equal(batch["input_ids"][seen], ids[seen])
    assert not ids[~seen].any()
    expected = theirs.get_text_features(**batch).pooler_output
    assert (ours.encode_text(tokenizer(CAPTIONS)) - expected).abs().max() < TOLERANCE

    table = load_file(folder / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[list(content["clip_ids"])] = False
    assert len(table) == 49408 and not table[unseen].any()
    full = HF_CLIP.read_config(folder)
    assert full is not None and full.clip_ids is None and full.model.text.vocab_size == 49408

    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    values = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 48, 48)
    assert theirs.get_image_features(pixel_values=values).pooler_output.shape == (1, 20)


def test_preprocessing_in_both_directions(tmp_path: Path) -> None:
    what = Contents("clip", tiny("ViT-H-14"))
    state = state_of(random_clip(what.model))
    for number, image in enumerate(
        [Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), Preprocess(crop_share=0.8), Preprocess(resize="squash")]
    ):
        folder = export(HF_CLIP, replace(what, preprocess=image), state, tmp_path / str(number))
        assert HF_CLIP.read_config(folder) == replace(what, preprocess=image)
