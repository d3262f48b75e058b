"""Which part of an image is seen, and the pixel statistics: decisions only, carried out by a decoder.

Train: torchvision's RandomResizedCrop. Evaluation: open_clip's `crop` (shortest edge, then centre) and `squash`.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaeva.config.schema import AugmentSection

MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

_ATTEMPTS = 10
_LONGEST_SIDE = 4  # times the crop; see eval_crop
_MIN_OVERSIZE = 2  # times the output; see reduced_scale


class Crop(NamedTuple):
    """What to do with one image: cut a source box, resize it bicubically with antialiasing, cut a window, mirror.

    Attributes:
        left, top, width, height: source box, whole pixels of the encoded image.
        resized_width, resized_height: pixels, size of the box after resizing.
        offset_left, offset_top: pixels, place of the output window in the resized box.
        flip: mirror left to right.
        exact: False in training only, where a decoder may trade levels for speed: see decode_pillow.decode_pixels.
    """

    left: int
    top: int
    width: int
    height: int
    resized_width: int
    resized_height: int
    offset_left: int = 0
    offset_top: int = 0
    flip: bool = False
    exact: bool = True


def train_crop(rng: np.random.Generator, width: int, height: int, augment: AugmentSection, image_size: int) -> Crop:
    """A random crop of a `width` x `height` image, resized to `image_size`; a function of `rng` and the arguments.

    Source: torchvision.transforms.RandomResizedCrop.get_params: ten attempts with the area uniform in `augment.scale`
    and the ratio log-uniform in `augment.ratio`, then the largest centred crop within the ratio bounds. The edges of a
    box that may be decoded at 1/n of its scale are moved to multiples of n, by n - 1 pixels of the image at most.
    """
    area = width * height
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    low, high = augment.scale
    left, top, crop_width, crop_height = _centred_within_ratio(width, height, augment.ratio)
    for _ in range(_ATTEMPTS):
        target_area = area * (low + (high - low) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            crop_width, crop_height = w, h
            break
    flip = augment.horizontal_flip > 0 and rng.random() < augment.horizontal_flip
    step = reduced_scale(crop_width, crop_height, image_size, image_size)
    left, top, crop_width, crop_height = (edge - edge % step for edge in (left, top, crop_width, crop_height))
    return Crop(left, top, crop_width, crop_height, image_size, image_size, flip=flip, exact=False)


def reduced_scale(width: int, height: int, resized_width: int, resized_height: int) -> int:
    """1, 2, 4 or 8: n of the smallest scale 1/n at which a box of an image is still at least twice its resized size.

    Twice is also the default of Pillow's `thumbnail`; nearer to the resized size the blocks' own low-pass filter shows
    (tests/unit/data/test_decode.py has the levels).
    """
    oversize = min(width // (_MIN_OVERSIZE * resized_width), height // (_MIN_OVERSIZE * resized_height))
    return next((n for n in (8, 4, 2) if n <= oversize), 1)


def _centred_within_ratio(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = max(1, min(width, round(height * ratio[1])))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def eval_crop(
    width: int, height: int, image_size: int, resize: Literal["crop", "squash"], crop_share: float = 1.0
) -> Crop:
    """The deterministic evaluation crop of a `width` x `height` image.

    crop: shortest edge to `image_size` / `crop_share`, then the centre, as torchvision's Resize and CenterCrop (up to
    the resampling phase in images more than four times as long as wide: their ends, which the centre never shows, are
    cut first, so that a 60,000 x 1 image is not blown up). squash: both edges to `image_size`.
    """
    if resize == "squash":
        return Crop(0, 0, width, height, image_size, image_size)
    left = top = 0
    if width > _LONGEST_SIDE * height:
        left, width = (width - _LONGEST_SIDE * height) // 2, _LONGEST_SIDE * height
    elif height > _LONGEST_SIDE * width:
        top, height = (height - _LONGEST_SIDE * width) // 2, _LONGEST_SIDE * width
    short = min(width, height)
    edge = round(image_size / crop_share)
    resized_width, resized_height = int(edge * width / short), int(edge * height / short)
    return Crop(
        left,
        top,
        width,
        height,
        resized_width,
        resized_height,
        round((resized_width - image_size) / 2),
        round((resized_height - image_size) / 2),
    )


# uint8 -> normalised fp32 as one multiply and one subtract
_SCALE_C11: NDArray[np.float32] = (1 / (255 * np.array(STD))).astype(np.float32)[:, None, None]
_SHIFT_C11: NDArray[np.float32] = (np.array(MEAN) / np.array(STD)).astype(np.float32)[:, None, None]


def normalise(pixel_CHW: NDArray[np.uint8], image_CHW: NDArray[np.float32]) -> None:
    """Fills `image_CHW`, a sample of a batch, with ((pixel / 255) - MEAN) / STD; the layout of `pixel_CHW` is free."""
    np.multiply(pixel_CHW, _SCALE_C11, out=image_CHW)
    image_CHW -= _SHIFT_C11
