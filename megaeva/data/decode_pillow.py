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
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info

from megaeva.data.decode import Decoded, EncodedImage
from megaeva.data.transforms import Crop, normalise, reduced_scale

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
    """`pixel_HWC` of one image, 8-bit RGB, cropped and resized but not mirrored; its memory may be laid out CHW.

    An exact crop (evaluation) is resized by Pillow at full scale, to the bit as torchvision does with a Pillow image.
    Others (training) are resized by torch's vectorised kernel of the same filter, six times as fast: of 255 levels at
    most 2 apart from a Pillow that resizes rows before columns, 0.005 on average (Pillow 13 takes the cheaper order,
    and rounds and clips in between: 0.2 on average where it differs). A JPEG whose box is at least four times as wide
    and high as the output is decoded at the smallest scale that leaves it twice as large: on photographs 0.4 to 1.1
    levels apart on average and 13 at most, less than Lanczos' filter instead of the bicubic one would make.

    Raises:
        BrokenImage: "truncated_image" or "damaged_image".
    """
    try:
        return _resize_exactly(image, crop, image_size) if crop.exact else _resize_fast(image, crop)
    except Exception as error:  # see open_image
        raise BrokenImage("truncated_image" if "truncated" in str(error) else "damaged_image") from None


def _resize_exactly(image: EncodedImage, crop: Crop, image_size: int) -> NDArray[np.uint8]:
    rgb = _rgb(image.header)
    if (crop.width, crop.height) != rgb.size:
        # Cropped first, as torchvision does: `resize(box=)` would let pixels outside the box shine in.
        rgb = rgb.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    rgb = rgb.resize((crop.resized_width, crop.resized_height), Image.Resampling.BICUBIC)
    if rgb.size != (image_size, image_size):
        left, top = crop.offset_left, crop.offset_top
        rgb = rgb.crop((left, top, left + image_size, top + image_size))
    return np.frombuffer(rgb.tobytes(), dtype=np.uint8).reshape(image_size, image_size, 3)


def _resize_fast(image: EncodedImage, crop: Crop) -> NDArray[np.uint8]:
    """`pixel_HWC` of a crop that `train_crop` made: the resized box is the output."""
    header, scale = image.header, reduced_scale(crop.width, crop.height, crop.resized_width, crop.resized_height)
    if isinstance(header, JpegImageFile) and scale > 1:
        # Another header, because `draft` changes its size, which others of this one have read.
        header = JpegImageFile(io.BytesIO(image.data))
        header.draft(None, (header.width // scale, header.height // scale))
    else:
        scale = 1
    left, top, width, height = (edge // scale for edge in crop[:4])
    # The copy makes a box of its own and, other than Pillow's bytes, one that torch may own.
    box_HWC = np.asarray(_rgb(header))[top : top + height, left : left + width].copy()
    if (width, height) == (crop.resized_width, crop.resized_height):
        return box_HWC
    resized_1CHW = functional.interpolate(
        torch.from_numpy(box_HWC).permute(2, 0, 1)[None],
        size=(crop.resized_height, crop.resized_width),
        mode="bicubic",
        antialias=True,
    )
    pixel_HWC: NDArray[np.uint8] = resized_1CHW[0].permute(1, 2, 0).numpy()
    return pixel_HWC


def new_batch(num_images: int, size: int) -> Tensor:
    """An empty fp32 `image_BCHW`; in a loader's worker in shared memory, so that it goes to the trainer uncopied."""
    image_BCHW = torch.empty(0)
    if get_worker_info() is not None:
        # As torch's default_collate does; share_memory_() would copy what is still empty.
        image_BCHW.set_(torch.UntypedStorage._new_shared(num_images * 3 * size * size * image_BCHW.element_size()))
    return image_BCHW.resize_(num_images, 3, size, size)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


class PillowDecoder:
    """Decodes on the CPU, in this thread; see `decode.Decoder`."""

    name = "pillow"
    num_fallbacks = 0

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size

    def decode(self, images: Sequence[EncodedImage], crops: Sequence[Crop]) -> Decoded:
        """Decodes `images` in order; see `decode.Decoder.decode`."""
        size = self._image_size
        image_BCHW = new_batch(len(images), size)
        pixel_BCHW = image_BCHW.numpy()
        num_good = 0
        broken: dict[int, str] = {}
        for place, (image, crop) in enumerate(zip(images, crops, strict=True)):
            try:
                pixel_HWC = decode_pixels(image, crop, size)
            except BrokenImage as error:
                broken[place] = str(error)
                continue
            pixel_CHW = pixel_HWC.transpose(2, 0, 1)
            normalise(pixel_CHW[:, :, ::-1] if crop.flip else pixel_CHW, pixel_BCHW[num_good])
            num_good += 1
        return Decoded(image_BCHW[:num_good], broken)
