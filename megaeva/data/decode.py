"""The one interface of the image decoders, and the choice between them."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from megaeva.data.transforms import Crop

DecoderName = Literal["auto", "dali", "pillow"]

logger = logging.getLogger(__name__)


class EncodedImage(NamedTuple):
    """An image whose header was read: `header.size` and `header.mode` are known, its pixels are not decoded yet."""

    data: bytes
    header: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.header.size


class Decoded(NamedTuple):
    """What a decoder made of a list of images.

    Attributes:
        image_BCHW: fp32, normalised with the CLIP mean and deviation, on the decoder's device; only those that could be
            decoded, in order.
        broken: reason by place in the list, for those that could not.
    """

    image_BCHW: Tensor
    broken: dict[int, str]


class Decoder(Protocol):
    """Decodes images and carries out the crops that `transforms` decided on.

    Attributes:
        name: "pillow" or "dali".
        num_fallbacks: images that another decoder had to take over.
    """

    name: str
    num_fallbacks: int

    def decode(self, images: Sequence[EncodedImage], crops: Sequence[Crop]) -> Decoded:
        """Decodes `images`, one crop for each; a broken image is reported, never raised."""
        ...


def make_decoder(
    name: DecoderName,
    image_size: int,
    *,
    batch_size: int,
    platform: Literal["auto", "cpu", "cuda"] = "auto",
    num_threads: int = 1,
    log: bool = False,
) -> Decoder:
    """The decoder called `name`; auto is DALI where there is a GPU and DALI is installed, else Pillow.

    Args:
        name: "auto", "dali" or "pillow".
        image_size: pixels, square output.
        batch_size: images at a time; more are decoded in several goes.
        platform: "cpu" keeps DALI off a GPU that is there.
        num_threads: decoding threads of DALI.
        log: write one line that says which decoder it is and why.

    Raises:
        UserError: DALI is asked for and not installed.
    """
    from megaeva.data.decode_dali import DaliDecoder, gpu_index  # imports DALI when it is made
    from megaeva.data.decode_pillow import PillowDecoder

    device = None if name == "pillow" else gpu_index(platform)
    if name == "dali" or (name == "auto" and device is not None and _dali_is_installed()):
        if log:
            logger.info("images are decoded by DALI on %s", "the CPU" if device is None else f"GPU {device}")
        return DaliDecoder(image_size, batch_size=batch_size, device=device, num_threads=num_threads)
    if log:
        why = "" if name == "pillow" else " (auto: no GPU)" if device is None else " (auto: DALI is not installed)"
        logger.info("images are decoded by Pillow on the CPU%s", why)
    return PillowDecoder(image_size)


def _dali_is_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
