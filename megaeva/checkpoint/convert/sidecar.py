"""What lies beside weights, in both directions: open_clip's and timm's configuration, and a run's megaeva.json.

A configuration that our towers cannot be told from is an error that names the key: weights would load, and give other
numbers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaeva.checkpoint import layout
from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.vocabulary import exported_text, vocabulary_notes
from megaeva.config.schema import LogitScaleSection, ModelSection, TextSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError

OPEN_CLIP_CONFIG = "open_clip_config.json"
TIMM_CONFIG = "config.json"

TIMM_TOWERS: dict[str, VisionSection] = {
    timm: VisionSection.model_validate(VARIANTS[ours]["vision"])
    for timm, ours in (
        ("eva_giant_patch14_clip_224", "EVA01-CLIP-g-14"),
        ("eva02_base_patch16_clip_224", "EVA02-CLIP-B-16"),
        ("eva02_large_patch14_clip_224", "EVA02-CLIP-L-14"),
        ("eva02_large_patch14_clip_336", "EVA02-CLIP-L-14-336"),
        ("eva02_enormous_patch14_clip_224", "EVA02-CLIP-bigE-14"),
    )
}
"""The EVA-CLIP towers that timm registers: what a timm configuration starts from."""

_OPEN_CLIP_TOWERS = {"eva_giant_patch14_224": TIMM_TOWERS["eva_giant_patch14_clip_224"]} | TIMM_TOWERS
"""Those that open_clip can name, its own choices first; it has them pool the cls token under either name."""

NO_TEXT = TextSection(hidden_size=64, num_layers=1, num_heads=1, ffn_hidden_size=256)
"""Stands in `Contents.model.text` of a vision tower alone."""

_TRAINING_ONLY = ("patch_dropout", "drop_path")


def same_tower(one: VisionSection, other: VisionSection) -> bool:
    """True when two towers have the same weights and outputs; what only training does may differ."""
    return one.model_dump(exclude=set(_TRAINING_ONLY)) == other.model_dump(exclude=set(_TRAINING_ONLY))


def unmet(tower: VisionSection, must: Mapping[str, tuple[Any, ...]]) -> tuple[str, Any] | None:
    """Returns the first key whose value is none of those it must have, "key=one or other", and its value; or None."""
    for key, values in must.items():
        if getattr(tower, key) not in values:
            return f"{key}={' or '.join(map(str, values))}", getattr(tower, key)
    return None


def beside(path: Path, name: str) -> Path:
    """Returns the file `name` in a folder of weights, or beside a file of them."""
    return (path if path.is_dir() else path.parent) / name


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file; None where there is no file.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it must be the JSON that describes the weights beside it; "
            "mend it, or move it away and name the model with --variant."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; it must be a JSON object that describes the weights beside it; "
            "mend it, or move it away and name the model with --variant."
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON with a line for each key."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def mlp_ratio(width: int, hidden: int) -> float:
    """Returns the ratio of which int(width * ratio) is `hidden`, as open_clip and timm compute it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


class Keys:
    """The keys of one object of a configuration, each asked for once; what is left must be of no consequence."""

    def __init__(self, path: Path, content: object, where: str) -> None:
        """Takes the object; `where` is its name for messages, "model_cfg.vision_cfg"."""
        self.path, self.where = path, where
        if not isinstance(content, dict):
            raise self.fault("", content, "an object")
        self._left: dict[str, Any] = dict(content)

    def fault(self, key: str, value: object, must: str) -> CheckpointError:
        """Returns the error about a key."""
        name = ".".join(part for part in (self.where, key) if part)
        return CheckpointError(
            f"{self.path}: {name} is {value!r}; it must be {must}: "
            "megaeva has no such model; name the one that was meant with --variant, or convert another checkpoint."
        )

    def take(self, key: str, default: Any = None) -> Any:
        """Returns the value; the default where it is missing or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number; a pair of equal ones counts as one."""
        value = self.take(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fault(key, value, "a number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a whole number above zero."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.fault(key, value, "a whole number above 0")
        return value

    def colours(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Returns three numbers."""
        value = self.take(key, default)
        if not (
            isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
        ):
            raise self.fault(key, value, "three numbers")
        red, green, blue = map(float, value)
        return red, green, blue

    def one_of(self, key: str, values: Mapping[Any, Any], default: Any) -> Any:
        """Returns what `values` makes of the value."""
        value = self.take(key, default)
        if not isinstance(value, (str, int, float)) or value not in values:
            raise self.fault(key, value, " or ".join(map(repr, values)))
        return values[value]

    def end(self, neutral: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
        """Checks what was not asked for: `neutral` keys must have that value, `ignored` ones any; others are errors."""
        for key, value in self._left.items():
            if key in ignored or value is None:
                continue
            if key not in neutral:
                raise self.fault(key, value, "absent")
            if value != neutral[key]:
                raise self.fault(key, value, repr(neutral[key]))


def validated(path: Path, what: dict[str, Any]) -> ModelSection:
    """Returns the model section; CheckpointError where the values of a file do not make one."""
    try:
        return ModelSection.model_validate(what)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} does not describe a model: {error}; it must be the configuration of the weights beside it; "
            "mend it, or move it away and name the model with --variant."
        ) from None


# ------------------------------------------------------------------------------------------------------- open_clip


def open_clip_refusal(what: Contents) -> str | None:
    """Returns why open_clip 3.3 cannot build this model, or None."""
    vision, text = what.model.vision, what.model.text
    if not vision.ln_pre:
        if not any(same_tower(vision, tower) for tower in _OPEN_CLIP_TOWERS.values()):
            return "open_clip builds EVA towers under timm's names only, and none of them is this one: " + ", ".join(
                _OPEN_CLIP_TOWERS
            )
        return None
    fault = unmet(
        vision,
        {
            "norm": ("layernorm",), "norm_position": ("pre",), "qkv_bias": ("qkv",), "sub_ln_attention": (False,),
            "sub_ln_mlp": (False,), "rope": (False,), "patch_bias": (False,), "head_bias": (False,),
            "activation": (text.activation,),
        },
    )  # fmt: skip
    return fault and f"open_clip's towers with ln_pre have {fault[0]}, this one has {fault[1]}"


def open_clip_notes(what: Contents) -> list[str]:
    """Returns what the report of an export must say: see `Format.notes`."""
    share = what.preprocess.crop_share
    if share == 1.0:
        return vocabulary_notes(what)
    return [
        *vocabulary_notes(what),
        f"preprocessing: open_clip shows all of the shortest edge, this model was measured on the centre's {share:.4g}",
    ]


def open_clip_config(what: Contents) -> dict[str, Any]:
    """Returns the content of open_clip_config.json: `create_model_and_transforms("local-dir:...")` needs no more.

    `what` must be a model that `open_clip_refusal` lets through.
    """
    model, vision, text = what.model, what.model.vision, exported_text(what)
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size}
    if vision.ln_pre:
        vision_cfg |= {
            "layers": vision.num_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_heads,
            "mlp_ratio": mlp_ratio(vision.hidden_size, vision.ffn_hidden_size),
            "patch_size": vision.patch_size,
        }
        if vision.norm_epsilon != 1e-5:
            vision_cfg["norm_kwargs"] = {"eps": vision.norm_epsilon}
    else:
        vision_cfg |= {
            "timm_model_name": next(name for name, tower in _OPEN_CLIP_TOWERS.items() if same_tower(vision, tower)),
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": None,
        }
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_heads,
        "layers": text.num_layers,
        "mlp_ratio": mlp_ratio(text.hidden_size, text.ffn_hidden_size),
    }
    if text.norm_epsilon != 1e-5:
        text_cfg["norm_kwargs"] = {"eps": text.norm_epsilon}
    model_cfg: dict[str, Any] = {"embed_dim": model.embed_dim, "quick_gelu": text.activation == "quick_gelu"}
    if model.logit_scale.bias is not None:
        model_cfg["init_logit_bias"] = model.logit_scale.bias
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if not vision.ln_pre:
        model_cfg["custom_text"] = True
    image = what.preprocess
    preprocess_cfg = {
        "size": vision.image_size,
        "mode": "RGB",
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[image.resize],
    }
    if image.crop_share != 1.0:
        preprocess_cfg["crop_share"] = image.crop_share  # open_clip has no such key and ignores it
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def write_open_clip_config(folder: Path, what: Contents) -> None:
    """Writes open_clip_config.json, with which open_clip loads the folder as "local-dir:FOLDER"."""
    write_json(folder / OPEN_CLIP_CONFIG, open_clip_config(what))


_OPEN_CLIP_VISION = {
    "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
    "pool_type": "tok", "block_type": "default", "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "timm_pool": "token", "timm_proj_bias": False,
    "act_kwargs": {},
}  # fmt: skip
_OPEN_CLIP_TEXT = {
    "embed_cls": False, "pad_id": 0, "no_causal_mask": False, "final_ln_after_pool": False, "pool_type": "argmax",
    "proj_bias": False, "proj_type": "linear", "block_type": "default", "qk_norm": False, "scaled_cosine_attn": False,
    "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "act_kwargs": {},
}  # fmt: skip


def read_open_clip_config(path: Path) -> Contents | None:
    """Returns what open_clip_config.json says of the weights in the folder or file `path`; None where there is none.

    Raises:
        CheckpointError: it is damaged, or describes a model that is not one of ours.
    """
    file = beside(path, OPEN_CLIP_CONFIG)
    content = read_json(file)
    if content is None:
        return None
    model = Keys(file, content.get("model_cfg", content), "model_cfg")
    activation = model.one_of("quick_gelu", {False: "gelu", True: "quick_gelu"}, False)
    embed_dim = model.size("embed_dim")
    scale = {"init": model.number("init_logit_scale", LogitScaleSection().init), "bias": model.take("init_logit_bias")}
    vision = Keys(file, model.take("vision_cfg", {}), "model_cfg.vision_cfg")
    text = Keys(file, model.take("text_cfg", {}), "model_cfg.text_cfg")
    model.end({"nonscalar_logit_scale": False}, ignored=("custom_text",))

    section = _open_clip_vision(vision, activation)
    width = text.size("width", 512)
    text_section = {
        "context_length": text.size("context_length", 77),
        "vocab_size": text.size("vocab_size", 49408),
        "hidden_size": width,
        "num_layers": text.size("layers", 12),
        "num_heads": text.size("heads", 8),
        "ffn_hidden_size": int(width * text.number("mlp_ratio", 4.0)),
        "activation": activation,
        "norm_epsilon": _epsilon(text),
    }
    text.end(
        _OPEN_CLIP_TEXT, ignored=("eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")
    )

    image = Keys(file, content.get("preprocess_cfg", {}), "preprocess_cfg")
    preprocess = Preprocess(
        mean=image.colours("mean", Preprocess.mean),
        std=image.colours("std", Preprocess.std),
        interpolation=image.one_of(
            "interpolation", {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}, "bicubic"
        ),
        resize=image.one_of("resize_mode", {"shortest": "crop", "squash": "squash"}, "shortest"),
        crop_share=image.number("crop_share", 1.0),
    )
    image.end({"mode": "RGB"}, ignored=("size", "fill_color"))
    whole = {"embed_dim": embed_dim, "vision": section, "text": text_section, "logit_scale": scale}
    return Contents("clip", validated(file, whole), preprocess)


def _open_clip_vision(vision: Keys, activation: str) -> dict[str, Any]:
    ignored = (
        "patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path", "attn_pooler_queries",
        "attn_pooler_heads",
    )  # fmt: skip
    name = vision.take("timm_model_name")
    if name is not None:
        if name not in _OPEN_CLIP_TOWERS:
            raise vision.fault("timm_model_name", name, "one of " + ", ".join(_OPEN_CLIP_TOWERS))
        tower = _OPEN_CLIP_TOWERS[name]
        vision.one_of("timm_proj", {"": None}, "")
        vision.one_of("image_size", {tower.image_size: None}, tower.image_size)
        vision.end({"timm_pool": "token"}, ignored)
        return tower.model_dump()
    width = vision.size("width", 768)
    section = {
        "image_size": vision.size("image_size", 224),
        "patch_size": vision.size("patch_size", 16),
        "hidden_size": width,
        "num_layers": vision.size("layers", 12),
        "num_heads": width // vision.size("head_width", 64),
        "ffn_hidden_size": int(width * vision.number("mlp_ratio", 4.0)),
        "activation": activation,
        "norm_epsilon": _epsilon(vision),
        "qkv_bias": "qkv",
        "patch_bias": False,
        "ln_pre": True,
    }
    vision.end(_OPEN_CLIP_VISION, (*ignored, "timm_pool", "timm_proj"))
    return section


def _epsilon(tower: Keys) -> float:
    norm = Keys(tower.path, tower.take("norm_kwargs", {}), tower.where + ".norm_kwargs")
    epsilon = norm.number("eps", 1e-5)
    norm.end({})
    return epsilon


# ------------------------------------------------------------------------------------------------------------ timm


def timm_refusal(what: Contents) -> str | None:
    """Returns why timm 1.0.31's `Eva` cannot be this vision tower, or None."""
    vision = what.model.vision
    must: dict[str, tuple[Any, ...]] = {
        "norm": ("layernorm",), "norm_epsilon": (1e-6,), "qkv_bias": ("qv", "none"), "activation": ("gelu", "swiglu"),
        "ln_pre": (False,), "patch_bias": (True,), "head_bias": (True,),
    }  # fmt: skip
    if vision.activation == "swiglu":
        must["sub_ln_mlp"] = (True,)  # without it timm fuses w1 and w2
    fault = unmet(vision, must)
    return fault and f"timm's Eva has {fault[0]}, this tower has {fault[1]}"


def timm_config(what: Contents) -> dict[str, Any]:
    """Returns the content of timm's config.json, with arguments for every size: the name is but where they start.

    `what` must be a model that `timm_refusal` lets through.
    """
    vision, image = what.model.vision, what.preprocess
    same = next((name for name, tower in TIMM_TOWERS.items() if same_tower(vision, tower)), None)
    style = "eva02_enormous_patch14_clip_224" if vision.norm_position == "post" else "eva_giant_patch14_clip_224"
    arguments: dict[str, Any] = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_layers,
        "num_heads": vision.num_heads,
        "mlp_ratio": mlp_ratio(vision.hidden_size, vision.ffn_hidden_size),
        "qkv_bias": vision.qkv_bias == "qv",
        "qkv_fused": not vision.sub_ln_attention,
        "swiglu_mlp": vision.activation == "swiglu",
        "scale_mlp": vision.sub_ln_mlp,
        "scale_attn_inner": vision.sub_ln_attention,
        "use_post_norm": vision.norm_position == "post",
        "use_rot_pos_emb": vision.rope,
        "global_pool": "token",
    }
    if vision.rope:
        arguments["ref_feat_shape"] = [vision.rope_pretrain_grid] * 2
    return {
        "architecture": same or style,
        "num_classes": what.model.embed_dim,
        "num_features": vision.hidden_size,
        "global_pool": "token",
        "model_args": {} if same else arguments,
        "pretrained_cfg": {
            "num_classes": what.model.embed_dim,
            "input_size": [3, vision.image_size, vision.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": image.interpolation,
            "crop_pct": image.crop_share,
            "crop_mode": {"crop": "center", "squash": "squash"}[image.resize],
            "mean": list(image.mean),
            "std": list(image.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_timm_config(folder: Path, what: Contents) -> None:
    """Writes config.json, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder."""
    write_json(folder / TIMM_CONFIG, timm_config(what))


def read_timm_config(path: Path) -> Contents | None:
    """Returns what timm's config.json says of the weights in the folder or file `path`; None where there is none.

    Raises:
        CheckpointError: it is damaged, or describes a tower that is not one of ours.
    """
    file = beside(path, TIMM_CONFIG)
    content = read_json(file)
    if content is None or "architecture" not in content:  # config.json is a name that other libraries use too
        return None
    top = Keys(file, content, "")
    name = top.take("architecture")
    if name not in TIMM_TOWERS:
        raise top.fault("architecture", name, "one of " + ", ".join(TIMM_TOWERS))
    tower = TIMM_TOWERS[name]
    arguments = Keys(file, top.take("model_args", {}), "model_args")
    width = arguments.size("embed_dim", tower.hidden_size)
    ratio = arguments.number("mlp_ratio", mlp_ratio(tower.hidden_size, tower.ffn_hidden_size))
    on = {True: True, False: False}
    inner = arguments.one_of("scale_attn_inner", on, tower.sub_ln_attention)
    section = {
        "image_size": arguments.size("img_size", tower.image_size),
        "patch_size": arguments.size("patch_size", tower.patch_size),
        "hidden_size": width,
        "num_layers": arguments.size("depth", tower.num_layers),
        "num_heads": arguments.size("num_heads", tower.num_heads),
        "ffn_hidden_size": int(width * ratio),
        "activation": arguments.one_of("swiglu_mlp", {True: "swiglu", False: "gelu"}, tower.activation == "swiglu"),
        "norm_position": arguments.one_of("use_post_norm", {True: "post", False: "pre"}, tower.norm_position == "post"),
        "qkv_bias": arguments.one_of("qkv_bias", {True: "qv", False: "none"}, True),
        "sub_ln_attention": inner,
        "sub_ln_mlp": arguments.one_of("scale_mlp", on, tower.sub_ln_mlp),
        "rope": arguments.one_of("use_rot_pos_emb", on, tower.rope),
        "rope_pretrain_grid": arguments.size("ref_feat_shape", tower.rope_pretrain_grid),
        "head_bias": True,
    }
    # timm's own save_for_hf repeats the classes, of which shapes decide.
    arguments.end({"qkv_fused": not inner, "global_pool": "token", "in_chans": 3}, ignored=("num_classes",))
    pretrained = Keys(file, top.take("pretrained_cfg", {}), "pretrained_cfg")
    embed_dim = top.size("num_classes", pretrained.take("num_classes"))
    preprocess = Preprocess(
        mean=pretrained.colours("mean", Preprocess.mean),
        std=pretrained.colours("std", Preprocess.std),
        interpolation=pretrained.one_of("interpolation", {"bicubic": "bicubic", "bilinear": "bilinear"}, "bicubic"),
        resize=pretrained.one_of("crop_mode", {"center": "crop", "squash": "squash"}, "center"),
        crop_share=pretrained.number("crop_pct", 1.0),
    )
    whole = {"embed_dim": embed_dim, "vision": section, "text": NO_TEXT}
    return Contents("vision", validated(file, whole), preprocess)


# ------------------------------------------------------------------------------------------------- run checkpoints


def contents_info(what: Contents) -> dict[str, Any]:
    """Returns the keys of megaeva.json that say what a checkpoint holds; `info_contents` reads them."""
    return {
        "kind": what.kind,
        "model": what.model.model_dump(mode="json"),
        "preprocess": asdict(what.preprocess),
        "clip_ids": None if what.clip_ids is None else list(what.clip_ids),
        "teacher_dim": what.teacher_dim,
    }


def info_contents(path: Path, info: Mapping[str, Any]) -> Contents:
    """Returns what the checkpoint at `path` holds, from its megaeva.json; or `path` is a file of the same keys.

    Raises:
        CheckpointError: a key is missing or has a value that no megaeva wrote.
    """
    top = Keys(path / "megaeva.json" if path.is_dir() else path, dict(info), "")
    if info.get("format") == layout.OLDEST_FORMAT:  # says the task only
        model = validated(top.path, top.take("model"))
        return Contents("mim" if info.get("task") == "mim" else "clip", model, source=path)
    kind = top.one_of("kind", {"clip": "clip", "vision": "vision", "mim": "mim"}, None)
    image = Keys(top.path, top.take("preprocess"), "preprocess")
    preprocess = Preprocess(
        mean=image.colours("mean", Preprocess.mean),
        std=image.colours("std", Preprocess.std),
        interpolation=image.one_of("interpolation", {"bicubic": "bicubic", "bilinear": "bilinear"}, None),
        resize=image.one_of("resize", {"crop": "crop", "squash": "squash"}, None),
        crop_share=image.number("crop_share"),
    )
    ids, dim = top.take("clip_ids"), top.take("teacher_dim")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids) and sorted(set(ids)) == ids):
        raise top.fault("clip_ids", ids, "ascending ids of CLIP's vocabulary, or null")
    if dim is not None and type(dim) is not int:
        raise top.fault("teacher_dim", dim, "a whole number or null")
    model = validated(top.path, top.take("model"))
    return Contents(kind, model, preprocess, dim, None if ids is None else tuple(ids), path)
