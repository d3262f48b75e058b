"""Captions to time the text tower on: as long as the context, or of typical lengths."""

from itertools import chain, cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from megaeva.config.schema import TextSection
from megaeva.config.variants import VARIANTS
from megaeva.data.shards import expand_shards, read_shard
from megaeva.data.tokenizer import Tokenizer

_EMOJI = Path("data/emoji")
# Web captions average 10 to 20 of CLIP's 77 tokens, start and end included.
_SHORTEST, _LONGEST = 10, 20


def end_tokens(cfg: TextSection, num_captions: int) -> tuple[Tensor, str]:
    """Random tokens [B, L] with the end token in the last place of each row, and a sentence that says so."""
    length = cfg.context_length
    return _draw(cfg, torch.full((num_captions,), length)), f"captions fill the {length} tokens"


def typical_tokens(cfg: TextSection, num_captions: int) -> tuple[Tensor, str]:
    """Tokens [B, L] of captions of typical lengths, padded with 0, and a sentence that says which.

    The demo's text tower gets real captions of data/emoji where that is made; others random tokens, 10 to 20 of them,
    every length equally often (fewer where the context is shorter).
    """
    if cfg.vocab_size == VARIANTS["Demo-Teacher"]["text"]["vocab_size"] and (_EMOJI / "train").is_dir():
        token_BL, source = _emoji_captions(cfg, num_captions), f"captions of {_EMOJI}/train"
    else:
        longest = min(_LONGEST, cfg.context_length)
        lengths = torch.linspace(min(_SHORTEST, longest // 2), longest, num_captions).round().int()
        token_BL, source = _draw(cfg, lengths), "random captions"
    length_B = token_BL.argmax(-1) + 1
    mean, longest = length_B.float().mean().item(), int(length_B.max())
    return token_BL, f"{source} of {mean:.1f} tokens on average, the longest {longest}, context {cfg.context_length}"


def _draw(cfg: TextSection, lengths: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (len(lengths), cfg.context_length)
    token_BL = torch.randint(1, cfg.vocab_size - 1, shape, generator=generator, device="cpu")
    for row, length in enumerate(lengths.tolist()):
        token_BL[row, length - 1] = cfg.vocab_size - 1  # the end token has the largest id
        token_BL[row, length:] = 0
    return token_BL


def _emoji_captions(cfg: TextSection, num_captions: int) -> Tensor:
    """The first captions of the training shards, in the order `megaeva data` shuffled them to; again from the start."""
    tokenizer = Tokenizer(cfg.context_length, _EMOJI / "vocab.json")
    samples = chain.from_iterable(map(read_shard, expand_shards([_EMOJI / "train" / "*.tar"])))
    captions = (sample.files["txt"].decode() for sample in samples if "txt" in sample.files)
    return tokenizer(list(islice(cycle(captions), num_captions)))
