"""The tokenizer against open_clip's, which is the oracle here."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from megaeva.data.tokenizer import NUM_BYTE_TOKENS, Tokenizer, build_subset
from megaeva.errors import DataError

OpenClip = Callable[..., Tensor]

_PIECES = (
    "it's", "WE'LL", "i'd", "'ſ", "'S", "don’t", "‘quoted’", "&amp;", "&amp;amp;lt;", "&#x1F600;", "&#0;", "&nbsp;",
    "&notanentity;", "<start_of_text>", "<END_OF_TEXT>", "<ſtart_of_text>", "<start_of_text", "|", "1234567", "½ Ⅷ ٣ 𝟘",
    "schÃ¶n", "â€œhiâ€\x9d", "ÃƒÂ©", "LoÃ«l", "\t", "\n", "\r\n", "\u2028", "\x85", "\xa0", "\u3000", "\u200b",
    "\ufeff", "\x00", "\x1b[31m", "\x7f", "\ud800", "\udfff", "\ufffd", "👩‍🚒", "🧑🏽‍🤝‍🧑🏿",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "İstanbul", "ẞ", "ﬁ", "Å", "é", "Ω",
    "\u6c49\u5b57", "\u30ab\u30bf\u30ab\u30ca", "\uff8a\uff9d\uff76\uff78", "العربية", "हिन्दी", "ไทย",
    "\ud55c\uad6d\uc5b4", "\u200d", "e\u0301", "----", "!?!?", "a.b,c", "@user", "#tag", "http://x.y/z?q=1&r=2",
    "a" * 22, "antidisestablishmentarianism", "_", "",
)  # fmt: skip
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCXYZ'"
_RANGES = (
    (0x20, 0x7E),
    (0x00, 0xFF),
    (0x100, 0x24F),
    (0x370, 0x52F),
    (0x0, 0xFFFF),
    (0x1F300, 0x1FAFF),
    (0x0, 0x10FFFF),
)


def _adversarial(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def character() -> str:
        return chr(rng.randint(*rng.choice(_RANGES)))

    def anything() -> str:
        return rng.choice((character(), rng.choice(_PIECES), " ", "'", "&", ";", str(rng.randrange(100))))

    def word() -> str:
        return "".join(rng.choices(_ALPHABET, k=rng.randint(1, 15)))

    def mojibake() -> str:  # UTF-8 read as another encoding
        text = "".join(chr(rng.randint(0xA0, 0x7FF)) for _ in range(9))
        return text.encode().decode(rng.choice(("latin-1", "cp1251")), "replace")

    kinds: tuple[Callable[[], str], ...] = (
        lambda: "".join(rng.choice(_PIECES) + rng.choice(("", " ", "  ")) for _ in range(rng.randrange(12))),
        lambda: "".join(character() for _ in range(rng.randrange(60))),
        mojibake,
        lambda: " ".join(word() for _ in range(rng.randrange(40))),
        lambda: "".join(anything() for _ in range(40)),
        lambda: "".join(rng.choices(rng.choice(("ab", "аб1 ")), k=rng.randrange(400))),
    )
    return ["", " ", "a" * 3000, "x " * 500, *_PIECES, *(rng.choice(kinds)() for _ in range(num))][:num]


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> OpenClip:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def demo_captions() -> list[str]:
    from megaeva.data.prepare.emoji import named_sequences

    return [emoji.name for emoji in named_sequences()[0]]


@pytest.mark.parametrize("context_length", [77, 8])
def test_ids_equal_open_clip_on_adversarial_strings(open_clip_tokenizer: OpenClip, context_length: int) -> None:
    texts = _adversarial(10_000 if context_length == 77 else 1_000, seed=context_length)
    expected = open_clip_tokenizer(texts, context_length=context_length)
    actual = Tokenizer(context_length)(texts)
    wrong = [text for text, a, e in zip(texts, actual, expected, strict=True) if not a.equal(e)]
    assert not wrong, wrong[:5]


def test_ids_equal_open_clip_on_demo_captions(open_clip_tokenizer: OpenClip, demo_captions: list[str]) -> None:
    assert len(demo_captions) > 3_000
    assert Tokenizer()(demo_captions).equal(open_clip_tokenizer(demo_captions))


def test_truncation_keeps_end_of_text() -> None:
    tokenizer = Tokenizer(5)
    (row,) = tokenizer(["one two three four five six"]).tolist()
    assert row[0] == tokenizer.sot_id
    assert row[-1] == tokenizer.eot_id == max(row)
    assert tokenizer(["one"]).tolist()[0][3:] == [0, 0]
    assert tokenizer([]).shape == (0, 5)


def test_a_full_cache_changes_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _adversarial(200, seed=1)
    expected = Tokenizer()(texts)
    monkeypatch.setattr("megaeva.data.tokenizer._CACHE_WORDS", 3)
    tokenizer = Tokenizer()
    assert tokenizer(texts).equal(expected)
    assert tokenizer(texts).equal(expected)


def test_tokenizer_travels_to_worker_processes() -> None:
    texts = ["a woman firefighter", "ça va"]
    assert pickle.loads(pickle.dumps(Tokenizer()))(texts).equal(Tokenizer()(texts))


def test_subset_cuts_its_captions_as_the_full_vocabulary(tmp_path: Path, demo_captions: list[str]) -> None:
    subset = build_subset(demo_captions)
    (tmp_path / "vocab.json").write_text(json.dumps(subset))
    small, full = Tokenizer(subset=tmp_path / "vocab.json"), Tokenizer()
    clip_ids = subset["clip_ids"]
    assert isinstance(clip_ids, list)
    assert small.vocab_size == len(clip_ids) < 5_000
    assert small.eot_id == small.vocab_size - 1
    for caption in demo_captions:
        assert [clip_ids[i] for i in small.encode(caption)] == full.encode(caption)


def test_subset_keeps_nothing_but_bytes_and_the_merges_used(tmp_path: Path) -> None:
    subset = build_subset(["cat"])
    clip_ids = subset["clip_ids"]
    assert isinstance(clip_ids, list)
    # "cat</w>" is made from "c" + "at</w>", and that from "a" + "t</w>": two merges, then sot and eot.
    assert clip_ids[:NUM_BYTE_TOKENS] == list(range(NUM_BYTE_TOKENS))
    assert len(clip_ids) == NUM_BYTE_TOKENS + 4
    (tmp_path / "vocab.json").write_text(json.dumps(subset))
    tokenizer = Tokenizer(subset=tmp_path / "vocab.json")
    assert len(tokenizer.encode("cat")) == 1
    assert len(tokenizer.encode("dog 🦊")) == 3 + 4  # any other text still encodes, byte by byte
    assert int(tokenizer(["dog 🦊"]).max()) == tokenizer.eot_id


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\xff",
        b"[]",
        b"{}",
        b'{"clip_ids": [1, 2, 3]}',
        json.dumps({"clip_ids": [*range(512), 49407, 49406]}).encode(),
    ],
)
def test_bad_subset_file_is_explained(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "vocab.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"vocab\.json.*must be.*megaeva data emoji"):
        Tokenizer(subset=path)


def test_missing_vocabulary_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from megaeva.data import tokenizer
    from megaeva.errors import UserError

    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        tokenizer.clip_vocabulary_path()
