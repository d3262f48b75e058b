"""Decoding with NVIDIA DALI: on the GPU ("mixed") where there is one, else on the CPU.

DALI gets complete JPEGs; everything else goes through Pillow: other formats (DALI decodes them on the CPU too), CMYK,
and JPEGs without an end marker, which DALI would fill with grey or refuse together with their whole batch.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megaeva.data.decode import Decoded, EncodedImage
from megaeva.data.decode_pillow import PillowDecoder
from megaeva.data.transforms import MEAN, STD, Crop
from megaeva.errors import UserError

logger = logging.getLogger(__name__)

_TAIL_BYTES = 1024  # some writers leave padding or a thumbnail's rest after the end marker


def gpu_index(platform: Literal["auto", "cpu", "cuda"]) -> int | None:
    """The GPU that this process computes on, or None: no GPU, or platform "cpu"."""
    if platform == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_device()


def is_complete_jpeg(image: EncodedImage) -> bool:
    """Whether `image` is a grey or colour JPEG that has an end-of-image marker near its end."""
    data = image.data
    return (
        image.header.format == "JPEG"
        and image.header.mode in ("RGB", "L")
        and (data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9", -_TAIL_BYTES) > 0)
    )


class DaliDecoder:
    """Decodes with DALI; see `decode.Decoder`.

    The pixels agree with Pillow's within 0.5 levels of 255 on average and 24 at most (tests/unit/data/test_decode.py):
    both resize with the same cubic kernel and antialiasing, but Pillow rounds and clips between its two passes.
    """

    name = "dali"

    def __init__(self, image_size: int, *, batch_size: int, device: int | None, num_threads: int = 1) -> None:
        """`device`: GPU index, or None for the CPU; `num_threads`: DALI's own decoding threads.

        Raises:
            UserError: DALI is not installed.
        """
        self.num_fallbacks = 0
        self._image_size, self._batch_size = image_size, batch_size
        self._device, self._num_threads = device, num_threads
        self._pillow = PillowDecoder(image_size)
        self._pipeline = self._build()

    def decode(self, images: Sequence[EncodedImage], crops: Sequence[Crop]) -> Decoded:
        """Decodes `images` in order; see `decode.Decoder.decode`."""
        size = self._image_size
        device = torch.device("cpu" if self._device is None else f"cuda:{self._device}")
        image_BCHW = torch.empty((len(images), 3, size, size), dtype=torch.float32, device=device)
        broken: dict[int, str] = {}
        suited = [place for place, image in enumerate(images) if is_complete_jpeg(image)]
        for start in range(0, len(suited), self._batch_size):
            places = suited[start : start + self._batch_size]
            decoded = self._run([images[p].data for p in places], [crops[p] for p in places])
            if decoded is None:
                self._decode_with_pillow(places, images, crops, image_BCHW, broken)
            elif len(places) == len(images):
                image_BCHW = decoded
            else:
                image_BCHW[torch.tensor(places, device=device)] = decoded
        if others := sorted(set(range(len(images))) - set(suited)):
            self._decode_with_pillow(others, images, crops, image_BCHW, broken)
        if broken:
            image_BCHW = image_BCHW[
                torch.tensor([p for p in range(len(images)) if p not in broken], device=device).long()
            ]
        return Decoded(image_BCHW, broken)

    def _decode_with_pillow(
        self,
        places: Sequence[int],
        images: Sequence[EncodedImage],
        crops: Sequence[Crop],
        image_BCHW: Tensor,
        broken: dict[int, str],
    ) -> None:
        self.num_fallbacks += len(places)
        decoded = self._pillow.decode([images[p] for p in places], [crops[p] for p in places])
        broken.update({places[p]: reason for p, reason in decoded.broken.items()})
        good = torch.tensor([p for p in places if p not in broken], device=image_BCHW.device).long()
        image_BCHW[good] = decoded.image_BCHW.to(image_BCHW.device)

    def _run(self, encoded: Sequence[bytes], crops: Sequence[Crop]) -> Tensor | None:
        """The normalised batch, or None after DALI refused one of its images."""
        size = self._image_size
        feed = self._pipeline.feed_input
        try:
            feed("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
            feed("start", np.array([(c.top, c.left) for c in crops], np.int32))
            feed("shape", np.array([(c.height, c.width) for c in crops], np.int32))
            feed("size", np.array([(c.resized_height, c.resized_width) for c in crops], np.float32))
            # crop_mirror_normalize wants the window's place as a share of the room it has
            room = [(max(1, c.resized_height - size), max(1, c.resized_width - size)) for c in crops]
            place = [(c.offset_top / y, c.offset_left / x) for c, (y, x) in zip(crops, room)]
            feed("place", np.array(place, np.float32))
            feed("flip", np.array([c.flip for c in crops], np.int32))
            (output,) = self._pipeline.run()
            # DALI writes the next batch into the same memory.
            return torch.from_dlpack(output.as_tensor()).clone()
        except RuntimeError as error:
            logger.warning(
                "DALI refused one of %d images, Pillow decodes them all: %s", len(encoded), str(error).splitlines()[0]
            )
            self._pipeline = self._build()  # one that has failed cannot be run again
            return None

    def _build(self) -> Any:
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as error:
            raise UserError(
                f"data.decoder=dali, but NVIDIA DALI cannot be imported ({error}); it must be installed; "
                "run: pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or set data.decoder=pillow"
            ) from None
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            resized = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            place = fn.external_source(name="place", dtype=types.FLOAT, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            image = fn.decoders.image_slice(
                encoded,
                device="cpu" if self._device is None else "mixed",
                start=start,
                shape=shape,
                axes=(0, 1),
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg, so as Pillow
                adjust_orientation=False,  # Pillow, torchvision and open_clip ignore the EXIF orientation
            )
            image = fn.resize(image, size=resized, interp_type=types.INTERP_CUBIC, antialias=True)
            image = fn.crop_mirror_normalize(
                image,
                crop=(self._image_size, self._image_size),
                crop_pos_y=place[0],
                crop_pos_x=place[1],
                mirror=flip,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
            )
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline
