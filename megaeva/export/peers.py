"""Implementations that this project did not write, with the weights of a file under the file's own names.

They are built as the configuration beside the file says, where there is one: flags that shapes do not show are compared
too then. Without one they are built as the file was taken for.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.hf_config import CONFIG, hf_clip_config
from megaeva.checkpoint.convert.sidecar import (
    OPEN_CLIP_CONFIG,
    TIMM_CONFIG,
    beside,
    mlp_ratio,
    open_clip_config,
    read_json,
)
from megaeva.checkpoint.tensors import TensorSource


@dataclass(frozen=True)
class Peer:
    """One tower of another implementation, fp32 on the CPU.

    Attributes:
        name: with version.
        run: a batch of images or of token ids to the embeddings, of kind mim to the tokens after the last norm.
    """

    name: str
    run: Callable[[Tensor], Tensor]


def peers(format_name: str, source: TensorSource, what: Contents) -> dict[str, Callable[[], Peer] | str]:
    """Returns for each tower of a file what builds its peer, or why there is none.

    Args:
        source: the file, in its own names.
    """
    towers = ("vision", "text") if what.kind == "clip" else ("vision",)
    if format_name == "hf-eva":
        return dict.fromkeys(towers, "BAAI's remote code comes with its weights only, and is not run")
    if format_name == "hf-clip":
        return {tower: partial(_transformers, source, what, tower) for tower in towers}
    model_cfg = _open_clip_model_cfg(source) if format_name == "open_clip" else None
    if what.model.vision.ln_pre or model_cfg is not None:
        cfg = model_cfg or open_clip_config(what)["model_cfg"]
        return {tower: partial(_open_clip, source, cfg, tower) for tower in towers}
    config = beside(source.path, TIMM_CONFIG)
    configured = config.parent if format_name == "timm" and config.is_file() else None
    found: dict[str, Callable[[], Peer] | str] = {"vision": partial(_timm, source, what, configured)}
    if what.model.vision.norm == "rmsnorm":
        found["vision"] = "timm has no EVA tower with RMSNorm, and EVA-CLIP's repository is no package"
    if what.kind == "clip":
        # That of EVA-CLIP's repository is open_clip's of its time, under the same names.
        found["text"] = partial(_open_clip_text, source, what)
    return found


def _open_clip(source: TensorSource, model_cfg: Mapping[str, Any], tower: str) -> Peer:
    """Its own towers, which are OpenAI's too, or those that its configuration names."""
    import open_clip

    cfg = dict(model_cfg)
    custom = cfg.pop("custom_text", False) or any(name.startswith("text.") for name in source.infos)
    model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**cfg)
    # What is left out holds no weight: OpenAI's input_resolution, context_length and vocab_size.
    _load(model, _state(source, "", model.state_dict()))
    return Peer(_name("open_clip", "open_clip_torch"), model.encode_image if tower == "vision" else model.encode_text)


def _open_clip_model_cfg(source: TensorSource) -> dict[str, Any] | None:
    content = read_json(beside(source.path, OPEN_CLIP_CONFIG))
    return None if content is None else content.get("model_cfg")


def _open_clip_text(source: TensorSource, what: Contents) -> Peer:
    import open_clip

    # As beside a vision tower of its own: it has no name for every EVA tower, and that one is not built.
    vision = what.model.vision.model_copy(update={"ln_pre": True})
    cfg = open_clip_config(replace(what, model=what.model.model_copy(update={"vision": vision})))["model_cfg"]
    tower = open_clip.model._build_text_tower(cfg["embed_dim"], cfg["text_cfg"], cfg["quick_gelu"])
    return Peer(_name("open_clip", "open_clip_torch"), _load(tower, _state(source, "text.")))


def _timm(source: TensorSource, what: Contents, configured: Path | None) -> Peer:
    """timm's Eva, through its own filter of EVA's and open_clip's names.

    Args:
        configured: a folder with timm's configuration of it.
    """
    import timm
    from timm.models.eva import checkpoint_filter_fn

    tower = _eva(what) if configured is None else timm.create_model(f"local-dir:{configured}", pretrained=False)
    # The filter takes a tower with a mask token for one that is to be fine-tuned, and moves its norm behind a pooling.
    state = {
        name: tensor
        for name, tensor in _state(source, "").items()
        if name != "mask_token" and not name.startswith("lm_head.")
    }
    _load(tower, checkpoint_filter_fn(state, tower))
    return Peer(_name("timm", "timm"), tower.forward_features if what.kind == "mim" else tower)


def _eva(what: Contents) -> Any:
    """timm's tower of these sizes and flags."""
    from timm.models.eva import Eva

    vision = what.model.vision
    gated = vision.activation == "swiglu"
    return Eva(
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        embed_dim=vision.hidden_size,
        depth=vision.num_layers,
        num_heads=vision.num_heads,
        mlp_ratio=mlp_ratio(vision.hidden_size, vision.ffn_hidden_size),
        num_classes=0 if what.kind == "mim" else what.model.embed_dim,
        global_pool="" if what.kind == "mim" else "token",
        qkv_bias=vision.qkv_bias == "qv",
        qkv_fused=not gated,
        swiglu_mlp=gated,
        scale_mlp=vision.sub_ln_mlp,
        scale_attn_inner=vision.sub_ln_attention,
        use_rot_pos_emb=vision.rope,
        ref_feat_shape=vision.rope_pretrain_grid if vision.rope else None,
        use_post_norm=vision.norm_position == "post",
    )


def _transformers(source: TensorSource, what: Contents, tower: str) -> Peer:
    import transformers

    content = read_json(beside(source.path, CONFIG))
    model = transformers.CLIPModel(transformers.CLIPConfig(**(content or hf_clip_config(what, source.infos))))
    _load(model, _state(source, "", model.state_dict()))

    def run(batch: Tensor) -> Tensor:
        if tower == "vision":
            return model.get_image_features(pixel_values=batch).pooler_output  # type: ignore[no-any-return]
        return model.get_text_features(input_ids=batch).pooler_output  # type: ignore[no-any-return]

    return Peer(_name("transformers", "transformers"), run)


def _state(source: TensorSource, prefix: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors that begin with `prefix`, without it, in fp32; only those of `names` where they are given."""
    return {
        name.removeprefix(prefix): source.read(name).float()
        for name in source.infos
        if name.startswith(prefix) and (names is None or name in names)
    }


def _load(module: Any, state: Mapping[str, Tensor]) -> Any:
    module.load_state_dict(state, strict=True)
    return module.float().requires_grad_(False).eval()


def _name(title: str, distribution: str) -> str:
    return f"{title} {version(distribution)}"
