"""Videos: which frames are seen, what a loader makes of them, and what becomes of broken ones."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from megaeva.config.schema import AugmentSection, Config, PhaseSection
from megaeva.data import video
from megaeva.data.batch import Batch
from megaeva.data.decode_pillow import BrokenImage
from megaeva.data.loader import Loader
from megaeva.data.phases import PhasedLoader
from megaeva.data.preflight import preflight
from megaeva.data.synthetic import make_shards
from megaeva.data.transforms import MEAN, STD, Crop
from megaeva.data.video import VideoDecoder, frame_indices, open_video
from megaeva.errors import DataError, UserError
from tests.helpers.data_recipe import IMAGE_SIZE, data_recipe
from tests.helpers.videos import encode, grey_video, level, without_beginning

SIZE, FRAMES, MAX_PIXELS = IMAGE_SIZE, 4, 10_000
WHOLE = Crop(0, 0, 64, 48, SIZE, SIZE, exact=False)


def pixels(image: torch.Tensor) -> torch.Tensor:
    """Levels 0..255 of normalised images [..., 3, H, W]."""
    return (image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def recipe(train: Path | str, num_workers: int = 0, frames: int = FRAMES) -> Config:
    return data_recipe(
        train,
        batch=4,
        patch_dropout=0.5,
        frames=frames,
        num_workers=num_workers,
        shuffle_buffer=2,
        max_dropped_share=0.5,
        max_image_pixels=MAX_PIXELS,
        augment=AugmentSection(scale=(0.5, 0.9), horizontal_flip=0.5),
    )


@pytest.mark.parametrize(
    ("num_frames", "frames", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (300, 8, [18, 56, 93, 131, 168, 206, 243, 281]),
        (101, 1, [50]),
        (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_frames_are_the_middles_of_equal_parts(num_frames: int, frames: int, expected: list[int]) -> None:
    assert frame_indices(num_frames, frames) == expected


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("avi", "mpeg4")],
)
@pytest.mark.parametrize("num_frames", [20, 3])
def test_the_frames_that_are_named_are_decoded_in_order(container: str, codec: str, num_frames: int) -> None:
    encoded = open_video(grey_video(num_frames, container=container, codec=codec), MAX_PIXELS)
    assert (encoded.size, encoded.num_frames) == ((64, 48), num_frames)
    decoder = VideoDecoder(SIZE, FRAMES, max_pixels=MAX_PIXELS, num_threads=2)
    image_BCHW, broken = decoder.decode([encoded, encoded], [WHOLE, WHOLE._replace(flip=True)])
    assert not broken
    assert image_BCHW.shape == (2 * FRAMES, 3, SIZE, SIZE)
    levels = pixels(image_BCHW).unflatten(0, (2, FRAMES)).mean(2)
    wanted = torch.tensor([float(level(i)) for i in frame_indices(num_frames, FRAMES)])
    for clip, light in ((levels[0], slice(SIZE // 2 + 3, None)), (levels[1], slice(SIZE // 2 - 3))):
        assert (clip[:, :, light].mean((1, 2)) - wanted).abs().max() < 4
    assert (levels[1] - levels[0].flip(-1)).abs().max() < 1e-3


def test_a_crop_is_that_of_an_image_and_the_same_for_all_frames() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize(
        (64, 48), Image.Resampling.BICUBIC
    )
    encoded = open_video(encode([np.asarray(picture)] * 9), MAX_PIXELS)
    crop = Crop(10, 5, 40, 30, SIZE, SIZE, exact=False)
    image_BCHW, _ = VideoDecoder(SIZE, FRAMES, max_pixels=MAX_PIXELS).decode([encoded], [crop])
    box = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(10, 5, 50, 35))
    expected = torch.from_numpy(np.asarray(box).copy()).permute(2, 0, 1)
    assert (pixels(image_BCHW) - expected).abs().mean((1, 2, 3)).max() < 6  # of 255: coding and half the colour points


def faststart(num_frames: int = 20) -> bytes:
    return grey_video(num_frames, movflags="faststart")


def without_last_frame() -> bytes:
    """All bytes of the frames before it are there."""
    data = faststart()
    with av.open(io.BytesIO(data)) as container:
        return data[: max(packet.pos for packet in container.demux(video=0) if packet.pos is not None)]


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "not_a_video"),
        (png, "not_a_video"),
        # FFmpeg would open what these name.
        (lambda: b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile:///etc/passwd\n", "not_a_video"),
        (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "not_a_video"),
        (lambda: grey_video(20)[:24] + bytes(range(256)) * 8, "damaged_video"),
        (lambda: grey_video(20)[:800], "damaged_video"),  # the index is at the end
        (lambda: faststart()[:-200], "truncated_video"),
        (without_last_frame, "truncated_video"),
        (lambda: grey_video(2, size=(128, 96)), "decompression_bomb"),
        (sound, "missing_video_stream"),
        (lambda: grey_video(20, container="avi", codec="mpeg4").replace(b"FMP4", b"????"), "unsupported_codec"),
        (lambda: grey_video(13), "long_video"),
    ],
)
def test_what_cannot_be_a_sample_is_named(monkeypatch: pytest.MonkeyPatch, make: object, reason: str) -> None:
    if reason == "long_video":
        monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 12)
    assert callable(make)
    with pytest.raises(BrokenImage, match=f"^{reason}$"):
        open_video(make(), MAX_PIXELS)


def motion_jpeg(*sizes: tuple[int, int]) -> bytes:
    """An AVI whose frames have sizes of their own; its header has the first one's."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        for index, size in enumerate(sizes):
            picture = io.BytesIO()
            Image.new("RGB", size).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts = stream, index, index
            output.mux(packet)
    return file.getvalue()


def test_what_breaks_while_decoding_is_reported_and_the_rest_is_given() -> None:
    whole = grey_video(20)
    zeroed = bytearray(faststart())
    start = zeroed.index(b"mdat") + 4
    zeroed[start : start + 600] = bytes(600)  # packets of the right sizes that hold nothing
    videos = [
        open_video(data, MAX_PIXELS)
        for data in (whole, motion_jpeg((64, 48), (64, 48), (32, 24), (64, 48)), bytes(zeroed), whole)
    ]
    image_BCHW, broken = VideoDecoder(SIZE, FRAMES, max_pixels=MAX_PIXELS).decode(videos, [WHOLE] * 4)
    assert broken == {1: "changing_size", 2: "damaged_video"}
    assert torch.equal(image_BCHW[:FRAMES], image_BCHW[FRAMES:])
    # Nobody has memory for a picture much larger than the header says: the codec refuses it.
    bomb = open_video(motion_jpeg((64, 48), (640, 480), (64, 48), (64, 48)), MAX_PIXELS)
    assert VideoDecoder(SIZE, FRAMES, max_pixels=MAX_PIXELS).decode([bomb], [WHOLE]).broken == {0: "damaged_video"}


@pytest.mark.parametrize("seconds", [0.5, 1.2])
def test_of_a_clip_that_was_cut_only_what_is_shown_counts(seconds: float) -> None:
    """Ten frames a second; key frames are the first, ninth and seventeenth."""
    encoded = open_video(without_beginning(grey_video(20), seconds), MAX_PIXELS)
    shown = range(round(10 * seconds), 20)
    assert encoded.num_frames == len(shown)
    image_BCHW, _ = VideoDecoder(SIZE, FRAMES, max_pixels=MAX_PIXELS).decode([encoded], [WHOLE])
    found = pixels(image_BCHW)[..., SIZE // 2 + 3 :].mean((1, 2, 3))
    wanted = torch.tensor([float(level(shown[i])) for i in frame_indices(len(shown), FRAMES)])
    assert (found - wanted).abs().max() < 4


def test_the_text_that_a_file_carries_may_be_of_any_encoding() -> None:
    for container in ("mp4", "matroska"):
        data = grey_video(20, container=container).replace(b"Lavf", b"L\xe9on")
        assert b"L\xe9on" in data
        assert open_video(data, MAX_PIXELS).num_frames == 20


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'megaeva\[video\]'"):
        open_video(b"\0\0\0\x1cftypisom", MAX_PIXELS)


# ------------------------------------------------------------------------------------------------------- the loader


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips of 12 frames; every third is broken, two of them where only decoding shows it."""
    path = tmp_path_factory.mktemp("videos") / "000000.tar"
    good, late = grey_video(12), motion_jpeg((64, 48), (32, 24), (32, 24), (32, 24))
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(10):
            content = good if i % 3 else (late if i else png())
            writer.write({"__key__": f"{i}", "mp4": content, "txt": f"clip {i}".encode()})
    return path


def take(cfg: Config, count: int) -> tuple[list[Batch], Loader]:
    loader = Loader(cfg, data_rank=0, data_size=1, num_patches=16)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches, loader


def test_a_batch_of_videos(shard: Path) -> None:
    batches, loader = take(recipe(shard), 3)
    assert loader.dropped == {"not_a_video": 2, "changing_size": 6}
    for batch in batches:
        assert (len(batch), batch.frames, batch.image_BCHW.shape) == (4, FRAMES, (16, 3, SIZE, SIZE))
        assert batch.token_BL is not None and batch.keep_BK is not None
        assert (batch.token_BL.shape, batch.keep_BK.shape) == ((4, 12), (16, 8))
        assert len({tuple(row.tolist()) for row in batch.keep_BK}) == 16  # each frame keeps patches of its own
        # Time goes on in all clips alike: one crop and one flip for the frames of a clip.
        levels = pixels(batch.image_BCHW).unflatten(0, (4, FRAMES)).mean(2)
        steps = levels.diff(dim=1)
        assert (steps - 30).abs().max() < 6
        assert set(batch.keys) <= {f"000000/{key}" for key in (1, 2, 4, 5, 7, 8)}
    again, _ = take(recipe(shard), 3)
    for one, other in zip(batches, again, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.image_BCHW, other.image_BCHW)


def test_parts_of_a_batch_hold_whole_clips(shard: Path) -> None:
    ((batch,), _) = take(recipe(shard), 1)
    parts = batch.in_parts(3)
    assert [len(part) for part in parts] == [2, 1, 1]
    assert {part.frames for part in parts} == {FRAMES}
    for name in ("image_BCHW", "keep_BK", "token_BL"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name


def test_preflight_looks_for_videos(shard: Path) -> None:
    report = preflight(recipe(shard), data_size=1)
    assert "mp4 x 10" in report
    assert "64 x 48 pixels, 'clip 1'" in report
    with pytest.raises(DataError, match=r"10 missing_image .* must have an image \(jpg, jpeg, png, webp\) and a txt"):
        preflight(recipe(shard, frames=1), data_size=1)


def test_a_phase_of_videos_follows_one_of_images(shard: Path, tmp_path: Path) -> None:
    make_shards(tmp_path, num_shards=1, samples_per_shard=4)
    images = PhaseSection(samples=4, train=(f"{tmp_path}/*.tar",))
    videos = PhaseSection(samples=96, train=(str(shard),), frames=FRAMES)
    cfg = recipe(shard, frames=1)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"train": (), "phases": (images, videos)})})
    loader = PhasedLoader(cfg, data_rank=0, data_size=1, num_patches=16)
    assert [(len(batch), batch.frames) for batch in (next(loader), next(loader))] == [(4, 1), (4, FRAMES)]
    loader.close()
