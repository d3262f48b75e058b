"""Decoding with Pillow, and the header check that comes before any decoder."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from megaeva.data.decode import Decoded, EncodedImage
from megaeva.data.transforms import Crop, normalise

# 16-bit and float modes have no agreed range to squeeze into 8 bits.
_MODES = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"))


class BrokenImage(Exception):
    """An image that cannot be used; its text is the reason that drops are counted by."""


def open_image(data: bytes, max_pixels: int) -> EncodedImage:
    """`data` with its header read, no pixel decoded.

    The plugins are called directly: `Image.open` would warn or raise by its own pixel limit, and costs as much again.

    Raises:
        BrokenImage: "not_an_image" (no JPEG, PNG or WebP), "damaged_image" (header), "unsupported_mode", or
            "decompression_bomb" (more than `max_pixels`).
    """
    stream = io.BytesIO(data)
    try:
        header: Image.Image
        if data[:3] == b"\xff\xd8\xff":
            header = JpegImageFile(stream)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            header = PngImageFile(stream)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = WebPImageFile(stream)
        else:
            raise BrokenImage("not_an_image")
    except BrokenImage:
        raise
    except Exception:  # the plugins raise whatever a damaged header makes of them
        raise BrokenImage("damaged_image") from None
    width, height = header.size
    if width * height > max_pixels:
        raise BrokenImage("decompression_bomb")
    if width < 1 or height < 1:
        raise BrokenImage("damaged_image")
    if header.mode not in _MODES:
        raise BrokenImage("unsupported_mode")
    return EncodedImage(data, header)


def decode_pixels(image: EncodedImage, crop: Crop, image_size: int) -> NDArray[np.uint8]:
    """`pixel_HWC` of one image, 8-bit RGB, cropped and resized but not mirrored.

    Raises:
        BrokenImage: "truncated_image" or "damaged_image".
    """
    try:
        rgb = image.header.convert("RGB") if image.header.mode != "RGB" else image.header
        if (crop.width, crop.height) != rgb.size:
            # Cropped first, as torchvision does: `resize(box=)` would let pixels outside the box shine in.
            rgb = rgb.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        rgb = rgb.resize((crop.resized_width, crop.resized_height), Image.Resampling.BICUBIC)
        if rgb.size != (image_size, image_size):
            left, top = crop.offset_left, crop.offset_top
            rgb = rgb.crop((left, top, left + image_size, top + image_size))
        return np.frombuffer(rgb.tobytes(), dtype=np.uint8).reshape(image_size, image_size, 3)
    except Exception as error:  # see open_image
        raise BrokenImage("truncated_image" if "truncated" in str(error) else "damaged_image") from None


class PillowDecoder:
    """Decodes on the CPU, in this thread; see `decode.Decoder`."""

    name = "pillow"
    num_fallbacks = 0

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size

    def decode(self, images: Sequence[EncodedImage], crops: Sequence[Crop]) -> Decoded:
        """Decodes `images` in order; see `decode.Decoder.decode`."""
        size = self._image_size
        pixel_BHWC = np.empty((len(images), size, size, 3), dtype=np.uint8)
        num_good = 0
        broken: dict[int, str] = {}
        for place, (image, crop) in enumerate(zip(images, crops, strict=True)):
            try:
                pixel_HWC = decode_pixels(image, crop, size)
            except BrokenImage as error:
                broken[place] = str(error)
                continue
            pixel_BHWC[num_good] = pixel_HWC[:, ::-1] if crop.flip else pixel_HWC
            num_good += 1
        return Decoded(torch.from_numpy(normalise(pixel_BHWC[:num_good])), broken)
