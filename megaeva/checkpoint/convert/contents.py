"""What a set of weights is, beyond its tensors: model, parts, and how its images and captions are prepared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaeva.config.schema import ModelSection

Kind = Literal["clip", "vision", "mim"]
"""clip: both towers and the logit scale. vision: a vision tower with its head. mim: a vision tower without head, with
mask token and the projection onto the teacher's features where the file has them."""


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the tower's input; defaults are OpenAI's, with which EVA-CLIP was trained and measured.

    Attributes:
        mean, std: of RGB in [0, 1].
        resize: crop: shortest edge to the image size, then the centre; squash: both edges to it.
        crop_share: of crop: the centre's share of the resized shortest edge (timm's crop_pct).
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["crop", "squash"] = "crop"
    crop_share: float = 1.0


@dataclass(frozen=True)
class Contents:
    """Everything a destination needs to know that tensors do not say.

    Attributes:
        model: sizes and flags; of kind vision and mim only `vision` (and, of vision, `embed_dim`) means something.
        teacher_dim: of kind mim: width of lm_head; None: neither lm_head nor mask token was kept.
        clip_ids: CLIP's ids of the text tower's vocabulary in ascending order (vocab.json), None: all 49,408.
        source: where the weights came from, for the destination's records.
    """

    kind: Kind
    model: ModelSection
    preprocess: Preprocess = Preprocess()
    teacher_dim: int | None = None
    clip_ids: tuple[int, ...] | None = None
    source: Path | None = None
