"""Captions to time the text tower on: as long as the context, of typical lengths, or real ones."""

import importlib.util
import json
import random
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from megaeva.config.schema import TextSection
from megaeva.config.variants import VARIANTS
from megaeva.data.shards import expand_shards, read_shard
from megaeva.data.tokenizer import Tokenizer
from megaeva.errors import UserError

_EMOJI = Path("data/emoji")
# Web captions average 10 to 20 of CLIP's 77 tokens, start and end included.
_SHORTEST, _LONGEST = 10, 20
_NUM_REAL = 1600


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
    return token_BL, _describe(source, token_BL)


def real_tokens(cfg: TextSection, num_captions: int) -> tuple[Tensor, str]:
    """Tokens [B, L] of real sentences about images, padded with 0, and a sentence that says which.

    They are CuPL's descriptions of ImageNet's classes and the usual prompts, as clip-benchmark ships them, 14 tokens on
    average. Of 1,600 drawn ones, put in order of length, every (1600 / B)-th is taken: so the longest is neither lucky
    nor unlucky.

    Raises:
        UserError: clip-benchmark is not installed.
    """
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        raise UserError(
            "real captions come with clip-benchmark, which is not installed; it must be; `pip install 'megaeva[eval]'`."
        )
    prompts = json.loads((Path(found.origin).parent / "datasets" / "cupl_prompts.json").read_text(encoding="utf-8"))
    captions = [caption for of_class in prompts["imagenet1k"].values() for caption in of_class]
    token_NL = Tokenizer(cfg.context_length)(random.Random(0).sample(captions, _NUM_REAL))
    order_N = token_NL.argmax(-1).argsort(stable=True)
    places = ((torch.arange(num_captions) + 0.5) * (_NUM_REAL / num_captions)).long()
    token_BL = token_NL[order_N[places]]
    return token_BL, _describe("clip-benchmark's CuPL captions", token_BL)


def _describe(source: str, token_BL: Tensor) -> str:
    length_B = token_BL.argmax(-1) + 1
    mean, longest = length_B.float().mean().item(), int(length_B.max())
    return f"{source} of {mean:.1f} tokens on average, the longest {longest}, context {token_BL.shape[1]}"


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
