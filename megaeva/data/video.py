"""Videos with PyAV: which frames stand for a clip, and their pixels."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from megaeva.data.decode import Decoded, EncodedImage
from megaeva.data.decode_pillow import BrokenImage, decode_pixels, new_batch
from megaeva.data.transforms import Crop, normalise
from megaeva.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

MAX_VIDEO_FRAMES = 4096  # over two minutes; all before the last sampled one are decoded, so a film would stall a worker
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"wide")


class EncodedVideo(NamedTuple):
    """A video whose packets were counted, none decoded yet; `size`: (width, height) in pixels."""

    data: bytes
    size: tuple[int, int]
    num_frames: int


def frame_indices(num_frames: int, frames: int) -> list[int]:
    """Which of a video's frames are seen: those in the middle of `frames` equal parts of it; a short one's repeat.

    EVA-CLIP-18B samples "8 frames uniformly"; that these are the middles, and not the ends, of the parts is our choice.
    """
    return [(2 * part + 1) * num_frames // (2 * frames) for part in range(frames)]


def open_video(data: bytes, max_pixels: int) -> EncodedVideo:
    """`data` with its packets counted, no pixel decoded.

    Raises:
        BrokenImage: "not_a_video" (no MP4, QuickTime, Matroska, WebM or AVI), "missing_video_stream",
            "unsupported_codec", "damaged_video", "truncated_video" (frames that its index names are missing),
            "decompression_bomb" (frames of more than `max_pixels`) or "long_video" (more than MAX_VIDEO_FRAMES).
        UserError: PyAV is not installed.
    """
    av = _pyav()
    try:
        with _container(data, max_pixels) as container:
            if not container.streams.video:
                raise BrokenImage("missing_video_stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BrokenImage("unsupported_codec")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > max_pixels:
                raise BrokenImage("decompression_bomb")
            num_packets = num_frames = 0
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise BrokenImage("truncated_video")
                num_packets += packet.size > 0  # the last is an empty one
                # A clip that was cut without coding it again begins with frames that are decoded but not shown.
                num_frames += packet.size > 0 and not packet.is_discard
                if num_packets > MAX_VIDEO_FRAMES:
                    raise BrokenImage("long_video")
            if num_packets < len(stream.index_entries):
                raise BrokenImage("truncated_video")
    except av.FFmpegError:
        raise BrokenImage("damaged_video") from None
    if min(width, height, num_frames) < 1:
        raise BrokenImage("damaged_video")
    return EncodedVideo(data, (width, height), num_frames)


class VideoDecoder:
    """Decodes `frames` frames of each video on the CPU; a `decode.Decoder` of videos.

    One crop and flip holds for all frames of a clip. Pixels are taken as they are stored, as images' are: a rotation or
    pixel shape that the file asks of a player is ignored.
    """

    name = "pyav"
    num_fallbacks = 0

    def __init__(self, image_size: int, frames: int, *, max_pixels: int, num_threads: int = 1) -> None:
        """`num_threads`: clips decoded side by side."""
        self._image_size, self._frames = image_size, frames
        self._max_pixels, self._num_threads = max_pixels, num_threads

    def decode(self, videos: Sequence[EncodedVideo], crops: Sequence[Crop]) -> Decoded:
        """Decodes `videos`, one crop for each; see `decode.Decoder.decode`.

        Memory: a frame for each thread, beside the output, whose `image_BCHW` has the `frames` images of each good
        video in a row, in the order of time.
        """
        image_BCHW = new_batch(len(videos) * self._frames, self._image_size)
        image_BTCHW = image_BCHW.unflatten(0, (len(videos), self._frames))
        with ThreadPoolExecutor(self._num_threads) as threads:
            reasons = list(threads.map(self._fill, image_BTCHW, videos, crops))
        broken = {place: reason for place, reason in enumerate(reasons) if reason is not None}
        if broken:
            image_BCHW = image_BTCHW[[place for place in range(len(videos)) if place not in broken]].flatten(0, 1)
        return Decoded(image_BCHW, broken)

    def _fill(self, image_TCHW: Tensor, video: EncodedVideo, crop: Crop) -> str | None:
        """Fills a clip; returns None, or why it is broken."""
        wanted = frame_indices(video.num_frames, self._frames)
        try:
            for index, frame in enumerate(self._frames_of(video)):
                if index not in wanted:
                    continue
                if (frame.width, frame.height) != video.size:
                    return "changing_size"
                pixel_HWC = decode_pixels(EncodedImage(b"", frame.to_image()), crop, self._image_size)
                pixel_CHW = pixel_HWC.transpose(2, 0, 1)
                first, number = wanted.index(index), wanted.count(index)
                normalise(pixel_CHW[:, :, ::-1] if crop.flip else pixel_CHW, image_TCHW[first].numpy())
                image_TCHW[first + 1 : first + number] = image_TCHW[first]
                if index == wanted[-1]:
                    return None
        except BrokenImage as error:
            return str(error)
        return "damaged_video"  # the decoder passed over some frames

    def _frames_of(self, video: EncodedVideo) -> "Iterator[VideoFrame]":
        """The decoded frames in the order of time.

        Raises:
            BrokenImage: "damaged_video".
        """
        av = _pyav()
        try:
            with _container(video.data, self._max_pixels) as container:
                context = container.streams.video[0].codec_context
                context.thread_count = 1  # worker processes are what runs side by side
                context.options = _limit(self._max_pixels)
                for frame in container.decode(video=0):
                    if frame.is_corrupt:
                        raise BrokenImage("damaged_video")
                    yield frame
        except av.FFmpegError:
            raise BrokenImage("damaged_video") from None


def _container(data: bytes, max_pixels: int) -> "InputContainer":
    """`data` opened as what its first bytes say; FFmpeg must not guess: some of its formats are lists of other files
    and addresses, which it would open."""
    if data[4:8] in _MOV_ATOMS:
        name = "mov"
    elif data[:4] == b"\x1aE\xdf\xa3":
        name = "matroska"
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        name = "avi"
    else:
        raise BrokenImage("not_a_video")
    # Titles and the like, which nobody reads here, are often not UTF-8.
    return _pyav().open(io.BytesIO(data), format=name, options=_limit(max_pixels), metadata_errors="replace")


def _limit(max_pixels: int) -> dict[str, str]:
    """What FFmpeg refuses to have memory for, as it counts: with the borders that its codecs add around a frame."""
    return {"max_pixels": str(2 * max_pixels + 2**16)}


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"data.frames is above 1, but PyAV cannot be imported ({error}); it must be installed to decode videos; "
            "run: pip install 'megaeva[video]', or pip install av"
        ) from None
    return av
