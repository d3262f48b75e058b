"""Names and whole shapes of our models' parameters by arithmetic: what a run checkpoint holds; nothing is built."""

from collections.abc import Iterator

from megaeva.checkpoint.convert.contents import Contents
from megaeva.config.schema import TextSection, VisionSection

Shape = tuple[int, ...]


def shapes(what: Contents) -> dict[str, Shape]:
    """Returns the parameters of a model: every name of a run checkpoint with its whole (tp=1) shape, in model order.

    A distilled tower has mask token and lm_head where `what.teacher_dim` says that they were kept.
    """
    model = what.model
    head = None if what.kind == "mim" else model.embed_dim
    made = {f"vision.{name}": shape for name, shape in _vision(model.vision, head)}
    if what.kind == "mim" and what.teacher_dim is not None:
        made["mask_token"] = (1, 1, model.vision.hidden_size)
        made |= _affine("lm_head", (what.teacher_dim, model.vision.hidden_size), True)
    if what.kind == "clip":
        made |= {f"text.{name}": shape for name, shape in _text(model.text, model.embed_dim)}
        made["scale.log_scale"] = ()
        if model.logit_scale.bias is not None:
            made["scale.logit_bias"] = ()
    return made


def layer_norms(cfg: VisionSection) -> tuple[str, str]:
    """Returns the names of a layer's two norms, the attention's first. EVA calls them norm1 and norm2 either way."""
    if cfg.norm_position == "post":
        return "post_attention_layernorm", "post_mlp_layernorm"
    return "input_layernorm", "pre_mlp_layernorm"


def _affine(name: str, weight: Shape, has_bias: bool) -> dict[str, Shape]:
    made = {f"{name}.weight": weight}
    if has_bias:
        made[f"{name}.bias"] = weight[:1]
    return made


def _vision(cfg: VisionSection, embed_dim: int | None) -> Iterator[tuple[str, Shape]]:
    width, has_norm_bias = cfg.hidden_size, cfg.norm == "layernorm"
    yield "cls_token", (1, 1, width)
    yield "pos_embed", (1, cfg.num_patches + 1, width)
    yield from _affine("patch_embed", (width, 3, cfg.patch_size, cfg.patch_size), cfg.patch_bias).items()
    if cfg.ln_pre:
        yield from _affine("ln_pre", (width,), has_norm_bias).items()
    gates = 2 if cfg.activation == "swiglu" else 1
    layer: dict[str, Shape] = {}
    if cfg.qkv_bias == "qv":
        layer |= {"self_attention.q_bias": (width,), "self_attention.v_bias": (width,)}
    if cfg.sub_ln_attention:
        layer |= _affine("self_attention.inner_norm", (width,), has_norm_bias)
    if cfg.sub_ln_mlp:
        layer |= _affine("mlp.inner_norm", (cfg.ffn_hidden_size,), has_norm_bias)
    layer |= _linears(width, cfg.ffn_hidden_size, gates, cfg.qkv_bias == "qkv")
    for norm in layer_norms(cfg):
        layer |= _affine(norm, (width,), has_norm_bias)
    yield from _layers(layer, cfg.num_layers)
    yield from _affine("norm", (width,), has_norm_bias).items()
    if embed_dim is not None:
        yield from _affine("head", (embed_dim, width), cfg.head_bias).items()


def _text(cfg: TextSection, embed_dim: int) -> Iterator[tuple[str, Shape]]:
    width = cfg.hidden_size
    yield "token_embedding.weight", (cfg.vocab_size, width)
    yield "pos_embed", (cfg.context_length, width)
    layer = _linears(width, cfg.ffn_hidden_size, 1, True)
    layer |= _affine("input_layernorm", (width,), True) | _affine("pre_mlp_layernorm", (width,), True)
    yield from _layers(layer, cfg.num_layers)
    yield from _affine("norm", (width,), True).items()
    yield "head.weight", (embed_dim, width)


def _linears(width: int, ffn_width: int, gates: int, qkv_bias: bool) -> dict[str, Shape]:
    return {
        **_affine("self_attention.linear_qkv", (3 * width, width), qkv_bias),
        **_affine("self_attention.linear_proj", (width, width), True),
        **_affine("mlp.linear_fc1", (gates * ffn_width, width), True),
        **_affine("mlp.linear_fc2", (width, ffn_width), True),
    }


def _layers(layer: dict[str, Shape], num_layers: int) -> Iterator[tuple[str, Shape]]:
    for i in range(num_layers):
        for name, shape in layer.items():
            yield f"blocks.layers.{i}.{name}", shape
