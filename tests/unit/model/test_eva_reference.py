"""EVA-CLIP 8B and 18B, which no installed library has, against the formulas of facts.md in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaeva.config.schema import VisionSection
from megaeva.model import VisionTower
from tests.helpers.tiny import example_images, full_shapes, load_full, random_state, single_grid, tiny


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _attention(x_BSD: Tensor, p: dict[str, Tensor], num_heads: int) -> Tensor:
    batch, tokens, width = x_BSD.shape
    # Rows of our qkv weight: q, k, v of head 0, then of head 1, ...
    qkv = (x_BSD @ p["linear_qkv.weight"].T).view(batch, tokens, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    query, key, value = qkv
    scores = (query @ key.transpose(-1, -2)) * (width // num_heads) ** -0.5
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
    return mixed @ p["linear_proj.weight"].T + p["linear_proj.bias"]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def _tower(image: Tensor, state: dict[str, Tensor], cfg: VisionSection) -> Tensor:
    x = F.conv2d(image, state["patch_embed.weight"], state["patch_embed.bias"], stride=cfg.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for i in range(cfg.num_layers):
        p = {k.removeprefix(f"blocks.layers.{i}."): v for k, v in state.items() if k.startswith(f"blocks.layers.{i}.")}
        attention = {k.removeprefix("self_attention."): v for k, v in p.items() if k.startswith("self_attention.")}

        def mlp(x: Tensor, p: dict[str, Tensor] = p) -> Tensor:
            hidden = _gelu(x @ p["mlp.linear_fc1.weight"].T + p["mlp.linear_fc1.bias"])
            return hidden @ p["mlp.linear_fc2.weight"].T + p["mlp.linear_fc2.bias"]

        if cfg.norm_position == "post":
            x = x + _rms(_attention(x, attention, cfg.num_heads), p["post_attention_layernorm.weight"])
            x = x + _rms(mlp(x), p["post_mlp_layernorm.weight"])
        else:
            x = x + _attention(_rms(x, p["input_layernorm.weight"]), attention, cfg.num_heads)
            x = x + mlp(_rms(x, p["pre_mlp_layernorm.weight"]))
    return _rms(x, state["norm.weight"])


@pytest.mark.parametrize(
    "variant", ["EVA-CLIP-8B", "EVA-CLIP-8B-448", "EVA-CLIP-18B", "EVA-CLIP-18B-336", "Demo-Student"]
)
def test_rms_towers(variant: str) -> None:
    cfg = tiny(variant)
    grid = single_grid()
    tower = VisionTower(cfg.vision, cfg.embed_dim, grid=grid)
    shapes = full_shapes(tower)
    # No qkv bias though the other linears have one, no head bias, no norm bias.
    assert not any(name.endswith(("linear_qkv.bias", "q_bias", "head.bias", "norm.bias")) for name in shapes)
    assert "blocks.layers.0.self_attention.linear_proj.bias" in shapes
    state = random_state(shapes)
    load_full(tower, state, grid)
    image = example_images(cfg)
    leaves = {name: value.double().requires_grad_() for name, value in state.items()}
    expected_tokens = _tower(image.double(), leaves, cfg.vision)
    expected = expected_tokens[:, 0] @ leaves["head.weight"].T
    image_BE = tower(image)
    assert expected.abs().max() > 0.5
    assert (image_BE - expected).abs().max() < 1e-5
    # Over all tokens: no further from fp64 than twice the same formulas in fp32 (post-norms divide by small numbers).
    plain_tokens = _tower(image, state, cfg.vision)
    assert (tower.tokens(image) - expected_tokens).norm() <= 2 * (plain_tokens - expected_tokens).norm()
    # The hand-written backward of RMSNorm among the rest.
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * direction).sum().backward()
    (image_BE * direction).sum().backward()
    for name, param in tower.named_parameters():
        assert param.grad is not None
        theirs = leaves[name].grad
        assert theirs is not None
        assert (param.grad - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_wrong_flag_is_seen() -> None:
    """18B's weights in an 8B-shaped tower would give other numbers: the comparison above can fail."""
    cfg = tiny("EVA-CLIP-18B").vision
    state = {name: torch.zeros(shape) for name, shape in full_shapes(VisionTower(cfg, 20, grid=single_grid())).items()}
    state = random_state({name: value.shape for name, value in state.items()})
    image = torch.randn(2, 3, 16, 16)
    swapped = {
        name.replace("post_attention_layernorm", "input_layernorm").replace(
            "post_mlp_layernorm", "pre_mlp_layernorm"
        ): v
        for name, v in state.items()
    }
    pre = cfg.model_copy(update={"norm_position": "pre"})
    assert (_tower(image, state, cfg) - _tower(image, swapped, pre)).abs().max() > 0.1
