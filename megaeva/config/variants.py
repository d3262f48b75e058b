"""VARIANTS: every published tower pair this project knows, as plain data under the weights' upstream names.

Sources: the upstream model_configs of EVA-CLIP and open_clip, collected in ../shared/facts.md tables 1a-1d. The exact
parameter counts of each are asserted in tests/unit/model/test_count.py. Each value has the shape of `ModelSection`.
"""

from typing import Any


def _text(width: int, layers: int, heads: int, activation: str = "gelu") -> dict[str, Any]:
    return {
        "context_length": 77,
        "vocab_size": 49408,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_hidden_size": 4 * width,
        "activation": activation,
        "norm_epsilon": 1e-5,
    }


def _eva_layernorm(
    image: int, patch: int, width: int, layers: int, heads: int, ffn: int, **other: Any
) -> dict[str, Any]:
    """EVA-01 and EVA-02 towers: LayerNorm 1e-6, q and v bias, head with bias."""
    return {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_hidden_size": ffn,
        "activation": "gelu",
        "norm": "layernorm",
        "norm_epsilon": 1e-6,
        "qkv_bias": "qv",
        "head_bias": True,
    } | other


def _eva02_sub_ln(image: int, patch: int, width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    """EVA-02 B and L: SwiGLU, sub-LN in attention and MLP, 2-D RoPE beside the learned positions."""
    return _eva_layernorm(
        image, patch, width, layers, heads, ffn,
        activation="swiglu", sub_ln_attention=True, sub_ln_mlp=True, rope=True, rope_pretrain_grid=16,
    )  # fmt: skip


def _eva_rmsnorm(image: int, width: int, layers: int, heads: int, ffn: int, norm_position: str) -> dict[str, Any]:
    """EVA-CLIP 8B and 18B: RMSNorm 1e-6, no qkv bias though every other linear has one, head without bias."""
    return {
        "image_size": image,
        "patch_size": 14,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_hidden_size": ffn,
        "activation": "gelu",
        "norm": "rmsnorm",
        "norm_epsilon": 1e-6,
        "norm_position": norm_position,
        "qkv_bias": "none",
        "head_bias": False,
    }


def _clip(
    image: int, patch: int, width: int, layers: int, heads: int, ffn: int, activation: str = "gelu"
) -> dict[str, Any]:
    """OpenAI and open_clip towers: ln_pre, LayerNorm 1e-5, full qkv bias, patch embedding and head without bias."""
    return {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_hidden_size": ffn,
        "activation": activation,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "qkv_bias": "qkv",
        "patch_bias": False,
        "ln_pre": True,
        "head_bias": False,
    }


def _pair(embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "vision": vision, "text": text}


_G14 = _eva_layernorm(224, 14, 1408, 40, 16, 6144)
_E14 = _eva_layernorm(224, 14, 1792, 64, 16, 15360, norm_position="post")
# The demo's towers (../shared/emoji-pilot.md). The vocabulary is the subset that `megaeva data emoji` writes, padded:
# 3,956 tokens (bytes, the captions' tokens and the merges that lead to them); its longest caption has 17.
_DEMO_TEXT = {
    "context_length": 24,
    "vocab_size": 4096,
    "hidden_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_hidden_size": 384,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "EVA01-CLIP-g-14": _pair(1024, _G14, _text(768, 12, 12)),
    "EVA01-CLIP-g-14-plus": _pair(1024, _G14, _text(1024, 24, 16)),
    "EVA02-CLIP-B-16": _pair(512, _eva02_sub_ln(224, 16, 768, 12, 12, 2048), _text(512, 12, 8)),
    "EVA02-CLIP-L-14": _pair(768, _eva02_sub_ln(224, 14, 1024, 24, 16, 2730), _text(768, 12, 12)),
    "EVA02-CLIP-L-14-336": _pair(768, _eva02_sub_ln(336, 14, 1024, 24, 16, 2730), _text(768, 12, 12)),
    "EVA02-CLIP-bigE-14": _pair(1024, _E14, _text(1024, 24, 16)),
    "EVA02-CLIP-bigE-14-plus": _pair(1024, _E14, _text(1280, 32, 20)),
    "EVA-CLIP-8B": _pair(1280, _eva_rmsnorm(224, 4096, 32, 32, 20480, "pre"), _text(1280, 32, 20)),
    "EVA-CLIP-8B-448": _pair(1280, _eva_rmsnorm(448, 4096, 32, 32, 20480, "pre"), _text(1280, 32, 20)),
    "EVA-CLIP-18B": _pair(1536, _eva_rmsnorm(224, 5120, 48, 40, 25600, "post"), _text(1280, 32, 20)),
    # Paper only: no configuration file or weights of the 336 px model have been published.
    "EVA-CLIP-18B-336": _pair(1536, _eva_rmsnorm(336, 5120, 48, 40, 25600, "post"), _text(1280, 32, 20)),
    # OpenAI weights, under open_clip's names.
    "ViT-B-32-quickgelu": _pair(512, _clip(224, 32, 768, 12, 12, 3072, "quick_gelu"), _text(512, 12, 8, "quick_gelu")),
    "ViT-B-16-quickgelu": _pair(512, _clip(224, 16, 768, 12, 12, 3072, "quick_gelu"), _text(512, 12, 8, "quick_gelu")),
    "ViT-L-14-quickgelu": _pair(
        768, _clip(224, 14, 1024, 24, 16, 4096, "quick_gelu"), _text(768, 12, 12, "quick_gelu")
    ),
    "ViT-L-14-336-quickgelu": _pair(
        768, _clip(336, 14, 1024, 24, 16, 4096, "quick_gelu"), _text(768, 12, 12, "quick_gelu")
    ),
    # The same towers with GELU: OpenCLIP laion2b weights, and what open_clip builds under these names.
    "ViT-B-32": _pair(512, _clip(224, 32, 768, 12, 12, 3072), _text(512, 12, 8)),
    "ViT-B-16": _pair(512, _clip(224, 16, 768, 12, 12, 3072), _text(512, 12, 8)),
    "ViT-L-14": _pair(768, _clip(224, 14, 1024, 24, 16, 4096), _text(768, 12, 12)),
    "ViT-L-14-336": _pair(768, _clip(336, 14, 1024, 24, 16, 4096), _text(768, 12, 12)),
    "ViT-H-14": _pair(1024, _clip(224, 14, 1280, 32, 16, 5120), _text(1024, 24, 16)),
    "ViT-bigG-14": _pair(1280, _clip(224, 14, 1664, 48, 16, 8192), _text(1280, 32, 20)),
    # DFN5B weights.
    "ViT-H-14-quickgelu": _pair(
        1024, _clip(224, 14, 1280, 32, 16, 5120, "quick_gelu"), _text(1024, 24, 16, "quick_gelu")
    ),
    "ViT-H-14-378-quickgelu": _pair(
        1024, _clip(378, 14, 1280, 32, 16, 5120, "quick_gelu"), _text(1024, 24, 16, "quick_gelu")
    ),
    # A weak teacher in OpenAI's style and a stronger student in the style of EVA-CLIP-8B, at emoji size.
    "Demo-Teacher": _pair(96, _clip(48, 12, 96, 4, 4, 384), _DEMO_TEXT),
    "Demo-Student": _pair(96, _eva_rmsnorm(48, 192, 6, 6, 768, "pre") | {"patch_size": 12}, _DEMO_TEXT),
}

OPEN_CLIP_NAMES: dict[str, str] = {
    "EVA01-CLIP-g-14": "EVA01-g-14",
    "EVA01-CLIP-g-14-plus": "EVA01-g-14-plus",
    "EVA02-CLIP-B-16": "EVA02-B-16",
    "EVA02-CLIP-L-14": "EVA02-L-14",
    "EVA02-CLIP-L-14-336": "EVA02-L-14-336",
    "EVA02-CLIP-bigE-14": "EVA02-E-14",
    "EVA02-CLIP-bigE-14-plus": "EVA02-E-14-plus",
} | {name: name for name in VARIANTS if name.startswith("ViT-")}
"""What open_clip calls the variants that it has too."""
