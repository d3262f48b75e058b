"""The same CLIP in plain PyTorch: what a step would cost without Megatron-core, and an independent check of the towers.

No code of megaeva.model is used. It covers what the towers of VARIANTS have, without tokens or branches dropped at
random. Sequences are [B, S, D]; q, k and v of all heads come from one matrix, [all q, all k, all v].
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaeva.config.schema import ModelSection, OptimSection, TextSection, VisionSection


def _norm(kind: str, width: int, epsilon: float) -> nn.Module:
    return nn.LayerNorm(width, epsilon) if kind == "layernorm" else nn.RMSNorm(width, epsilon)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Attention(nn.Module):
    """Multi-head self-attention; `norm` is EVA-02's sub-LN."""

    def __init__(self, width: int, num_heads: int, bias: str, norm: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.norm = norm
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = _rotate(query, angles), _rotate(key, angles)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.proj(self.norm(heads.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    """Two linears; swiglu: fc1 is [gate, up]. `norm` is EVA-02's sub-LN."""

    def __init__(self, width: int, inner: int, activation: str, norm: nn.Module) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS.get(activation)  # None: swiglu
        self.fc1 = nn.Linear(width, inner if self.activation else 2 * inner)
        self.norm = norm
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = self.activation(self.fc1(x))
        else:
            gate, up = self.fc1(x).chunk(2, -1)
            x = F.silu(gate) * up
        out: Tensor = self.fc2(self.norm(x))
        return out


class Block(nn.Module):
    """Attention and MLP, each a residual branch with a norm before it or after it."""

    def __init__(self, attention: Attention, mlp: MLP, norm1: nn.Module, norm2: nn.Module, *, post: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm1, self.norm2, self.post = attention, mlp, norm1, norm2, post

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        if self.post:
            x = x + self.norm1(self.attention(x, angles))
            return x + self.norm2(self.mlp(x))
        x = x + self.attention(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Image [B, 3, H, W] to embedding [B, E]."""

    def __init__(self, cfg: VisionSection, embed_dim: int) -> None:
        super().__init__()
        width, inner = cfg.hidden_size, cfg.ffn_hidden_size

        def norm(size: int = width) -> nn.Module:
            return _norm(cfg.norm, size, cfg.norm_epsilon)

        self.patch_embed = nn.Conv2d(3, width, cfg.patch_size, cfg.patch_size, bias=cfg.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.num_patches + 1, width))
        self.ln_pre = norm() if cfg.ln_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                Attention(
                    width,
                    cfg.num_heads,
                    cfg.qkv_bias,
                    norm() if cfg.sub_ln_attention else nn.Identity(),
                    causal=False,
                ),
                MLP(width, inner, cfg.activation, norm(inner) if cfg.sub_ln_mlp else nn.Identity()),
                norm(),
                norm(),
                post=cfg.norm_position == "post",
            )
            for _ in range(cfg.num_layers)
        )
        self.norm = norm()
        self.head = nn.Linear(width, embed_dim, bias=cfg.head_bias)
        self.register_buffer("angles", _angles(cfg) if cfg.rope else None, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, self.angles)
        out: Tensor = self.head(self.norm(x[:, 0]))
        return out


class TextTransformer(nn.Module):
    """Token ids [B, L] to the embedding [B, E] of each caption's end token, the largest id. Computes all L tokens."""

    def __init__(self, cfg: TextSection, embed_dim: int) -> None:
        super().__init__()
        width = cfg.hidden_size

        def norm() -> nn.Module:
            return nn.LayerNorm(width, cfg.norm_epsilon)

        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.context_length, width))
        self.blocks = nn.ModuleList(
            Block(
                Attention(width, cfg.num_heads, "qkv", nn.Identity(), causal=True),
                MLP(width, cfg.ffn_hidden_size, cfg.activation, nn.Identity()),
                norm(),
                norm(),
                post=False,
            )
            for _ in range(cfg.num_layers)
        )
        self.norm = norm()
        self.head = nn.Linear(width, embed_dim, bias=False)

    def forward(self, token: Tensor) -> Tensor:
        x = self.token_embedding(token) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        end = x[torch.arange(len(x), device=x.device), token.argmax(-1)]
        out: Tensor = self.head(self.norm(end))
        return out


class CLIP(nn.Module):
    """Two towers and the inverse temperature's logarithm; calling it gives the loss of a batch of pairs."""

    def __init__(self, cfg: ModelSection) -> None:
        super().__init__()
        self.vision = VisionTransformer(cfg.vision, cfg.embed_dim)
        self.text = TextTransformer(cfg.text, cfg.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(cfg.logit_scale.init), requires_grad=cfg.logit_scale.trainable)

    def forward(self, image: Tensor, token: Tensor) -> Tensor:
        return self.loss(self.vision(image), self.text(token))

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The mean cross-entropy over pairs and both directions, of embeddings [B, E] that are not normalised."""
        logits = self.log_scale.exp() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).t()
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


def adamw(modules: list[nn.Module], log_scale: nn.Parameter, optim: OptimSection) -> torch.optim.AdamW:
    """torch's fused AdamW with the recipe's rates: one for all towers; matrices decay, positions and cls do not."""
    named = [item for module in modules for item in module.named_parameters()]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    chosen = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "lr": optim.vision.lr, "weight_decay": optim.weight_decay},
        {"params": [p for _, p in named if id(p) not in chosen], "lr": optim.vision.lr, "weight_decay": 0.0},
        {"params": [log_scale], "lr": optim.logit_scale_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon, fused=True)


# Names of megaeva.model, and what they are called here.
_NAMES = (
    (r"blocks\.layers\.", "blocks."),
    (r"\.self_attention\.linear_qkv\.", ".attention.qkv."),
    (r"\.self_attention\.linear_proj\.", ".attention.proj."),
    (r"\.self_attention\.inner_norm\.", ".attention.norm."),
    (r"\.self_attention\.", ".attention."),
    (r"\.mlp\.linear_", ".mlp."),
    (r"\.mlp\.inner_norm\.", ".mlp.norm."),
    (r"\.(input|post_attention)_layernorm\.", ".norm1."),
    (r"\.(pre_mlp|post_mlp)_layernorm\.", ".norm2."),
    (r"scale\.log_scale", "log_scale"),
)


def from_megatron(tensors: dict[str, Tensor], cfg: ModelSection) -> dict[str, Tensor]:
    """Whole tensors (weights, or their gradients) of a CLIPModel under the names and in the row order of `CLIP`."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".linear_qkv." in name:  # rows [q, k, v] of head 0, of head 1, ...
            heads = (cfg.vision if name.startswith("vision.") else cfg.text).num_heads
            tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for pattern, here in _NAMES:
            name = re.sub(pattern, here, name)
        renamed[name] = tensor
    return renamed


def _angles(cfg: VisionSection) -> Tensor:
    """cos and sin of EVA-02's rotary angles [2, S, K]: rows turn the first half of K, columns the second, cls none."""
    half = cfg.hidden_size // cfg.num_heads // 2
    frequency = 10_000.0 ** -(torch.arange(0, half, 2) / half)
    place = torch.arange(cfg.grid_size) * (cfg.rope_pretrain_grid / cfg.grid_size)
    row, column = torch.meshgrid(place, place, indexing="ij")
    turns = torch.stack([row, column], -1)[..., None] * frequency  # [grid, grid, 2, K / 4]
    angle = turns.flatten(2).flatten(0, 1).repeat_interleave(2, -1)  # neighbouring dims make a pair
    angle = F.pad(angle, (0, 0, 1, 0))
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair of neighbouring dims of x [B, A, S, K], turned by its token's angle."""
    cos, sin = angles
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
