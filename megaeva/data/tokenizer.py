"""CLIP's byte-pair tokenizer: the Rust `tokenizers` merger over the vocabulary file that open_clip_torch ships.

Cleaning and the split into words are open_clip 3.3.0's own (`SimpleTokenizer`, clean="lower"), with the same `regex`
and `ftfy` packages: Oniguruma inside `tokenizers` knows another Unicode version, and ids must be equal on every string.
"""

import gzip
import html
import importlib.util
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

from megaeva.config.schema import Config
from megaeva.errors import DataError, UserError

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
NUM_BYTE_TOKENS = 512  # 256 bytes inside a word, then the same 256 at the end of a word ("</w>")
_NUM_MERGES = 49152 - 256 - 2
_END_OF_WORD = "</w>"
_SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_WORD = regex.compile(
    "|".join(_SPECIAL_TOKENS) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# Web captions have an endless tail of words seen once; the cache is emptied when it holds this many (about 30 MiB).
_CACHE_WORDS = 1 << 17
_CACHE_WORD_LENGTH = 64  # characters


class Vocabulary(NamedTuple):
    """CLIP's tokens and how they are merged."""

    tokens: list[str]  # by CLIP id: bytes, bytes</w>, merges in rank order, sot, eot
    merges: list[tuple[str, str]]  # merge of rank r makes token NUM_BYTE_TOKENS + r


def clip_vocabulary_path() -> Path:
    """The path of CLIP's merge list inside the installed open_clip_torch, without importing it (it pulls torchvision).

    Raises:
        UserError: open_clip_torch is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / VOCABULARY_FILE
        if path.is_file():
            return path
    raise UserError(
        f"CLIP's vocabulary {VOCABULARY_FILE} is not installed; it is a file of the package open_clip_torch; "
        "run: pip install open_clip_torch"
    )


def _byte_symbols() -> str:
    """256 printable characters, one for each byte (GPT-2's table); CLIP's first vocabulary rows, sorted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(symbol[byte] for byte in range(256))


_BYTE_TABLE = dict(enumerate(_byte_symbols()))


@lru_cache(maxsize=1)
def clip_vocabulary() -> Vocabulary:
    """The whole vocabulary; UserError where open_clip_torch, which ships it, is not installed."""
    lines = gzip.decompress(clip_vocabulary_path().read_bytes()).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : 1 + _NUM_MERGES]]  # the first line is a version
    merges = [(left, right) for left, right in pairs]
    symbols = sorted(_byte_symbols())  # printable bytes first, then the 256+ stand-ins: code point order
    tokens = symbols + [s + _END_OF_WORD for s in symbols] + [left + right for left, right in merges]
    return Vocabulary(tokens + list(_SPECIAL_TOKENS), merges)


def clean(text: str) -> str:
    """`text` as CLIP reads it: mojibake and HTML entities mended, whitespace collapsed, lower case."""
    # Printable ASCII without an entity is left alone by ftfy and html, which cost more than all the rest.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Captions to CLIP token ids, equal to `open_clip.get_tokenizer("ViT-B-32")`; restricted to a subset if asked.

    Attributes:
        context_length: tokens of a row, sot and eot included.
        vocab_size: 49,408, or the size of the subset; ids are 0..vocab_size-1.
        sot_id, eot_id: start and end of text; eot is the largest id, so `argmax` finds it. Padding is 0.
    """

    def __init__(self, context_length: int = 77, subset: Path | str | None = None) -> None:
        """Loads the vocabulary.

        Args:
            context_length: tokens, at least 2.
            subset: a vocab.json holding what `build_subset` returned.

        Raises:
            UserError: open_clip_torch is not installed.
            DataError: `subset` is missing or not such a file.
        """
        if context_length < 2:
            raise ValueError(f"context_length {context_length} has no room for start and end of text")
        full = clip_vocabulary()
        clip_ids = list(range(len(full.tokens))) if subset is None else read_subset(Path(subset))
        self.context_length = context_length
        self.vocab_size = len(clip_ids)
        self.sot_id, self.eot_id = self.vocab_size - 2, self.vocab_size - 1
        self._ids = {full.tokens[clip_id]: i for i, clip_id in enumerate(clip_ids)}
        merges = [full.merges[clip_id - NUM_BYTE_TOKENS] for clip_id in clip_ids[NUM_BYTE_TOKENS:-2]]
        self._merger = BPE(vocab=self._ids, merges=merges, end_of_word_suffix=_END_OF_WORD)
        self._cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids of `captions`, int64 [B, L], sot first, padded with 0; too long a caption is cut and keeps eot."""
        token_BL = torch.zeros(len(captions), self.context_length, dtype=torch.long)
        for row, caption in enumerate(captions):
            ids = [self.sot_id, *self.encode(caption)[: self.context_length - 2], self.eot_id]
            token_BL[row, : len(ids)] = torch.tensor(ids)
        return token_BL

    def encode(self, caption: str) -> list[int]:
        """Token ids of one caption, without sot, eot, truncation or padding."""
        cache = self._cache
        ids: list[int] = []
        for word in _WORD.findall(clean(caption)):
            found = cache.get(word)
            ids += self._merge(word) if found is None else found
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        if word in _SPECIAL_TOKENS:
            return (self._ids[word],)
        ids = tuple(token.id for token in self._merger.tokenize(word.encode().decode("latin-1").translate(_BYTE_TABLE)))
        if len(word) <= _CACHE_WORD_LENGTH:
            if len(self._cache) >= _CACHE_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids


def recipe_tokenizer(cfg: Config) -> Tokenizer:
    """The tokenizer of a contrastive recipe.

    Raises:
        UserError: as `Tokenizer`, or the recipe's text tower has fewer embeddings than there are tokens.
    """
    subset = cfg.data.tokenizer_subset
    tokenizer = Tokenizer(cfg.model.text.context_length, subset)
    if tokenizer.vocab_size > cfg.model.text.vocab_size:
        raise DataError(
            f"tokenizer subset {subset} has {tokenizer.vocab_size} tokens, model.text.vocab_size="
            f"{cfg.model.text.vocab_size} must be at least as many; raise it, or name the vocab.json it was set for"
        )
    return tokenizer


def build_subset(captions: Iterable[str]) -> dict[str, object]:
    """The part of CLIP's vocabulary that `captions` use, to be written as vocab.json for `Tokenizer(subset=...)`.

    It keeps the 512 byte tokens, every merge on the way to a token of these captions, sot and eot. These captions are
    then cut exactly as by the full vocabulary: at each step the merge of lowest rank is one that was kept. Any other
    text can still be encoded, in smaller pieces. Ids are renumbered in ascending CLIP id, so eot stays the largest.
    """
    full = clip_vocabulary()
    tokenizer = Tokenizer()
    clip_id = {token: i for i, token in enumerate(full.tokens)}
    kept = set(range(NUM_BYTE_TOKENS)) | {tokenizer.sot_id, tokenizer.eot_id}
    # A merged token has one derivation (no two merges make the same string), so its parts can be read back.
    waiting = {i for caption in set(captions) for i in tokenizer.encode(caption)}
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting.update(clip_id[part] for part in full.merges[token - NUM_BYTE_TOKENS])
    return {"source": VOCABULARY_FILE, "num_tokens": len(kept), "clip_ids": sorted(kept)}


def read_subset(path: Path) -> list[int]:
    """CLIP's ids of a vocab.json's tokens, ascending. DataError: it is missing or not such a file."""
    full_size = len(clip_vocabulary().tokens)
    what_to_do = "write it with `megaeva data emoji OUT`, or leave data.tokenizer_subset out for all of CLIP's tokens"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"tokenizer subset {path} does not exist; it must be a vocab.json; {what_to_do}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer subset {path} cannot be read ({error}); it must be JSON; {what_to_do}") from None
    clip_ids = content.get("clip_ids") if isinstance(content, dict) else None
    if not (
        isinstance(clip_ids, list)
        and all(type(clip_id) is int and 0 <= clip_id < full_size for clip_id in clip_ids)
        and clip_ids[:NUM_BYTE_TOKENS] == list(range(NUM_BYTE_TOKENS))
        and clip_ids[-2:] == [full_size - 2, full_size - 1]
        and sorted(set(clip_ids)) == clip_ids
    ):
        raise DataError(
            f"tokenizer subset {path} is not a part of CLIP's vocabulary; `clip_ids` must be ascending, hold 0..511, "
            f"{full_size - 2} and {full_size - 1}; {what_to_do}"
        )
    return clip_ids
