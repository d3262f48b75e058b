"""What lies beside weights in a Hugging Face folder: config.json, preprocessor_config.json and CLIP's tokenizer.

Of EVA-CLIP's remote code (BAAI's configuration_evaclip.py and modeling_evaclip.py) only ports were seen, and none is
installed: names of keys are theirs, but no file of ours was loaded by it. `UNCONFIRMED` goes into every config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.sidecar import Keys, beside, read_json, unmet, validated, write_json
from megaeva.checkpoint.convert.vocabulary import CLIP_VOCABULARY, exported_text
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.config.schema import TextSection

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
UNCONFIRMED = (
    "written by megaeva after ports of BAAI's remote code, not checked against it: put its configuration_evaclip.py "
    "and modeling_evaclip.py beside this file; vision_config.post_layernorm of BAAI's own 18B file was not seen"
)
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


# -------------------------------------------------------------------------------------------------------- CLIPModel


def hf_clip_refusal(what: Contents) -> str | None:
    """Returns why transformers' CLIPModel cannot be this model, or None."""
    vision = what.model.vision
    must: dict[str, tuple[Any, ...]] = {
        "ln_pre": (True,), "norm": ("layernorm",), "norm_position": ("pre",), "qkv_bias": ("qkv",),
        "activation": ("gelu", "quick_gelu"), "sub_ln_attention": (False,), "sub_ln_mlp": (False,), "rope": (False,),
        "patch_bias": (False,), "head_bias": (False,),
    }  # fmt: skip
    if fault := unmet(vision, must):
        return f"transformers' CLIPModel has {fault[0]}, this tower has {fault[1]}; try hf-eva"
    return _bias_refusal(what)


def _bias_refusal(what: Contents) -> str | None:
    if what.model.logit_scale.bias is not None:
        return "transformers' CLIP models have no bias of the logits, this one (trained with the sigmoid loss) has"
    return None


def hf_clip_config(what: Contents, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Returns the content of config.json; `infos` are the tensors that come, for their dtype."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": what.model.embed_dim,
        "logit_scale_init_value": what.model.logit_scale.init,
        "initializer_factor": 1.0,
        **_dtype(infos),
        "text_config": {"model_type": "clip_text_model"} | _text_config(what),
        "vision_config": {"model_type": "clip_vision_model"} | _vision_config(what),
    }


def write_hf_clip_folder(folder: Path, what: Contents, infos: Mapping[str, TensorInfo]) -> None:
    """Writes everything that `CLIPModel`, `CLIPProcessor` and `CLIPTokenizer` read beside the weights."""
    write_json(folder / CONFIG, hf_clip_config(what, infos))
    _write_processor(folder, what)


def _dtype(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    sizes: dict[str, int] = {}
    for info in infos.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + info.num_bytes
    most = max(sizes, key=sizes.__getitem__)
    return {"dtype": most, "torch_dtype": most}  # transformers 5 and before


def _text_config(what: Contents) -> dict[str, Any]:
    text = exported_text(what)
    end = min(text.vocab_size, CLIP_VOCABULARY) - 1
    return {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "intermediate_size": text.ffn_hidden_size,
        "hidden_act": text.activation,
        "layer_norm_eps": text.norm_epsilon,
        "projection_dim": what.model.embed_dim,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _vision_config(what: Contents) -> dict[str, Any]:
    vision = what.model.vision
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_epsilon,
        "projection_dim": what.model.embed_dim,
    }


def read_hf_clip_config(path: Path) -> Contents | None:
    """Returns what a CLIPModel's config.json says of the weights in the folder or file `path`; None: there is none.

    Raises:
        CheckpointError: it is damaged, or describes a model that is not one of ours.
    """
    top = _opened(path)
    if top is None:
        return None
    vision, text = _tower(top, "vision"), _tower(top, "text")
    section = _read_vision(vision) | {
        "activation": vision.one_of("hidden_act", _ACTIVATIONS, "quick_gelu"),
        "norm_epsilon": vision.number("layer_norm_eps", 1e-5),
        "qkv_bias": "qkv",
        "patch_bias": False,
        "ln_pre": True,
    }
    return _contents(top, section, _read_text(text))


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def _opened(path: Path) -> Keys | None:
    """The config.json of weights if it is a CLIP's, of either layout."""
    file = beside(path, CONFIG)
    content = read_json(file)
    return Keys(file, content, "") if content is not None and content.get("model_type") == "clip" else None


def _tower(top: Keys, name: str) -> Keys:
    """The configuration of a tower; transformers lets an old `<name>_config_dict` win."""
    old, new = top.take(f"{name}_config_dict"), top.take(f"{name}_config", {})
    return Keys(top.path, new if old is None else old, f"{name}_config")


def _read_vision(vision: Keys) -> dict[str, Any]:
    return {
        "image_size": vision.size("image_size", 224),
        "patch_size": vision.size("patch_size", 32),
        "hidden_size": vision.size("hidden_size", 768),
        "num_layers": vision.size("num_hidden_layers", 12),
        "num_heads": vision.size("num_attention_heads", 12),
        "ffn_hidden_size": vision.size("intermediate_size", 3072),
    }


def _read_text(text: Keys) -> dict[str, Any]:
    vocabulary = text.size("vocab_size", CLIP_VOCABULARY)
    end = min(vocabulary, CLIP_VOCABULARY) - 1
    text.one_of("eos_token_id", {end: end, 2: end}, end)  # 2: before transformers 4.31, read as argmax
    return {
        "vocab_size": vocabulary,
        "context_length": text.size("max_position_embeddings", 77),
        "hidden_size": text.size("hidden_size", 512),
        "num_layers": text.size("num_hidden_layers", 12),
        "num_heads": text.size("num_attention_heads", 8),
        "ffn_hidden_size": text.size("intermediate_size", 2048),
        "activation": text.one_of("hidden_act", _ACTIVATIONS, "quick_gelu"),
        "norm_epsilon": text.number("layer_norm_eps", 1e-5),
    }


def _contents(top: Keys, vision: dict[str, Any], text: dict[str, Any]) -> Contents:
    model = validated(top.path, {"embed_dim": top.size("projection_dim", 512), "vision": vision, "text": text})
    return Contents("clip", model, _read_preprocessor(top.path, model.vision.image_size))


# ----------------------------------------------------------------------------------------------- EVA-CLIP, remote code


def hf_eva_refusal(what: Contents) -> str | None:
    """Returns why the EVA-CLIP of Hugging Face cannot be this model, or None."""
    vision = what.model.vision
    if vision.ln_pre or not vision.patch_bias:
        return "hf-eva has EVA's towers, without ln_pre and with a bias of the patch embedding; try hf-clip"
    if vision.sub_ln_attention != vision.sub_ln_mlp or (vision.sub_ln_mlp and vision.activation != "swiglu"):
        return "hf-eva has sub-LN in attention and SwiGLU MLP together (use_sub_ln), this tower in one of them"
    if vision.head_bias == (vision.qkv_bias == "none"):
        return "EVA's head has a bias exactly where q and v have one (qkv_bias), this tower's has not"
    return _bias_refusal(what)


def hf_eva_config(what: Contents, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Returns the content of config.json, see `UNCONFIRMED`."""
    vision = what.model.vision
    flags: dict[str, Any] = {
        "q_bias": vision.qkv_bias != "none",
        "k_bias": vision.qkv_bias == "qkv",
        "v_bias": vision.qkv_bias != "none",
        "use_rms_norm": vision.norm == "rmsnorm",
        "post_layernorm": vision.norm_position == "post",
        "use_sub_ln": vision.sub_ln_mlp,
        "use_swiglu_mlp": vision.activation == "swiglu",
        "use_rope": vision.rope,
    }
    if vision.rope:
        flags |= {"pretrained_seq_len": vision.rope_pretrain_grid, "rope_theta": 10000}
    if vision.activation == "swiglu":
        flags |= {"hidden_act": "silu"}
    text_flags = {
        "q_bias": True, "k_bias": True, "v_bias": True, "use_rms_norm": False, "post_layernorm": False,
        "use_sub_ln": False, "use_swiglu_mlp": False, "use_rope": False,
    }  # fmt: skip
    return {
        "architectures": ["EvaCLIPModel"],
        "auto_map": {
            "AutoConfig": "configuration_evaclip.EvaCLIPConfig",
            "AutoModel": "modeling_evaclip.EvaCLIPModel",
        },
        "megaeva_unconfirmed": UNCONFIRMED,
        "model_type": "clip",
        "projection_dim": what.model.embed_dim,
        "logit_scale_init_value": what.model.logit_scale.init,
        "initializer_factor": 1.0,
        **_dtype(infos),
        "text_config": {"model_type": "clip_text_model"} | _text_config(what) | text_flags,
        "vision_config": {"model_type": "clip_vision_model"} | _vision_config(what) | flags,
    }


def write_hf_eva_folder(folder: Path, what: Contents, infos: Mapping[str, TensorInfo]) -> None:
    """Writes config.json, preprocessor_config.json and the tokenizer; the remote code itself is BAAI's to give."""
    write_json(folder / CONFIG, hf_eva_config(what, infos))
    _write_processor(folder, what)


def read_hf_eva_config(path: Path) -> Contents | None:
    """Returns what an EVA-CLIP's config.json says of the weights in the folder or file `path`.

    None: there is none, or it leaves open whether norms come before or after (`post_layernorm`).

    Raises:
        CheckpointError: it is damaged, or describes a model that is not one of ours.
    """
    top = _opened(path)
    if top is None:
        return None
    vision, text = _tower(top, "vision"), _tower(top, "text")
    post = vision.take("post_layernorm")
    if post is None:
        return None
    on = {True: True, False: False}
    biases = tuple(vision.one_of(f"{part}_bias", on, True) for part in "qkv")
    bias = {(True, True, True): "qkv", (True, False, True): "qv", (False, False, False): "none"}.get(biases)
    if bias is None:
        raise vision.fault("q_bias, k_bias, v_bias", biases, "all, none, or those of q and v")
    swiglu, sub_ln = vision.one_of("use_swiglu_mlp", on, False), vision.one_of("use_sub_ln", on, False)
    section = _read_vision(vision) | {
        "activation": "swiglu" if swiglu else vision.one_of("hidden_act", _ACTIVATIONS, "gelu"),
        "norm": vision.one_of("use_rms_norm", {True: "rmsnorm", False: "layernorm"}, False),
        "norm_epsilon": vision.number("layer_norm_eps"),
        "norm_position": "post" if post else "pre",
        "qkv_bias": bias,
        "sub_ln_attention": sub_ln,
        "sub_ln_mlp": sub_ln,
        "rope": vision.one_of("use_rope", on, False),
        "rope_pretrain_grid": vision.size("pretrained_seq_len", 16),
        # EVA has one flag for both, qkv_bias [facts.md 1a].
        "head_bias": bias != "none",
    }
    return _contents(top, section, _read_text(text))


# -------------------------------------------------------------------------------------------- images and captions


def _write_processor(folder: Path, what: Contents) -> None:
    image, side = what.preprocess, what.model.vision.image_size
    crops = image.resize == "crop"
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / image.crop_share)} if crops else {"height": side, "width": side},
        "resample": _RESAMPLE[image.interpolation],
        "do_center_crop": crops,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    write_json(folder / PREPROCESSOR, preprocessor)
    write_tokenizer(folder, exported_text(what))


def write_tokenizer(folder: Path, text: TextSection) -> None:
    """CLIP's merges under Hugging Face's names; theirs cleans captions less (no ftfy, no HTML entities)."""
    from megaeva.data.tokenizer import clip_vocabulary

    tokens, merges = clip_vocabulary()
    names = [*tokens[:-2], "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {name: number for number, name in enumerate(names)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": names[-2], "eos_token": names[-1], "unk_token": names[-1], "pad_token": names[-1]}
    write_json(folder / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True} | specials,
    )


def _read_preprocessor(config: Path, side: int) -> Preprocess:
    file = config.with_name(PREPROCESSOR)
    content = read_json(file)
    if content is None:
        return Preprocess()
    image = Keys(file, content, "")
    size = image.take("size", {"shortest_edge": side})
    size = {"shortest_edge": size} if isinstance(size, int) else size  # of older files
    if not isinstance(size, dict) or not (
        size.keys() == {"shortest_edge"} or (size.keys() == {"height", "width"} and size["height"] == size["width"])
    ):
        raise image.fault("size", size, 'a "shortest_edge", or "height" and "width" that are equal')
    edge = size.get("shortest_edge")
    return Preprocess(
        mean=image.colours("image_mean", Preprocess.mean),
        std=image.colours("image_std", Preprocess.std),
        interpolation=image.one_of("resample", {number: name for name, number in _RESAMPLE.items()}, 3),
        resize="squash" if edge is None else "crop",
        crop_share=1.0 if edge is None else side / edge,
    )
