"""Tiny videos whose frames can be told apart."""

import io
import tempfile
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


def level(index: int) -> int:
    """The grey of frame `index` of `grey_video`."""
    return 20 + 10 * index


def grey_video(num_frames: int, size: tuple[int, int] = (64, 48), **how: Any) -> bytes:
    """A video of grey frames, each lighter than the one before, whose left half is 20 levels darker."""
    frames = []
    for index in range(num_frames):
        pixel_HWC = np.full((size[1], size[0], 3), level(index), np.uint8)
        pixel_HWC[:, : size[0] // 2] -= 20
        frames.append(pixel_HWC)
    return encode(frames, **how)


def encode(frames: list[NDArray[np.uint8]], container: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """A video of `frames` [H, W, 3], a key frame every eight; `options`: of the container."""
    with tempfile.NamedTemporaryFile() as file:  # movflags=faststart opens it by its name again
        _write(file.name, frames, container, codec, options)
        return file.read()


def without_beginning(video: bytes, seconds: float) -> bytes:
    """`video` cut without coding it again: an edit list hides the frames from the last key frame to `seconds`."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(io.BytesIO(video)) as source, av.open(file.name, "w", format="mp4") as output:
            (stream,) = source.streams.video
            copy = output.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None and packet.pts is not None:
                    packet.pts -= int(seconds / stream.time_base)
                    packet.dts -= int(seconds / stream.time_base)
                    packet.stream = copy
                    output.mux(packet)
        return file.read()


def _write(path: str, frames: list[NDArray[np.uint8]], container: str, codec: str, options: dict[str, str]) -> None:
    with av.open(path, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 8, 1_000_000
        for pixel_HWC in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixel_HWC, format="rgb24")))
        output.mux(stream.encode())
