"""Decoders against each other and against torchvision, and what they say of broken images."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop, v2

from megaeva.config.schema import AugmentSection
from megaeva.data.decode import Decoder, EncodedImage, make_decoder
from megaeva.data.decode_dali import DaliDecoder, is_complete_jpeg
from megaeva.data.decode_pillow import BrokenImage, PillowDecoder, decode_pixels, open_image
from megaeva.data.transforms import MEAN, STD, Crop, eval_crop, normalise, reduced_scale, train_crop

SIZE = 48
MAX_PIXELS = 1_000_000
# Of 255 levels. Pillow rounds and clips between its two passes, DALI does not: seen 0.15-0.20, 4 and 16.
MEAN_TOLERANCE, P999_TOLERANCE, MAX_TOLERANCE = 0.5, 6.0, 24.0
# What decoding at reduced scale may change, of 255 levels: seen 0.4-1.05 and 13.
REDUCED_MEAN, REDUCED_MAX = 1.1, 16


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Smooth patches with edges and sensor noise."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 255, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8))
    pixels = np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    return Image.fromarray((pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} | options if kind == "JPEG" else options))
    return stream.getvalue()


def opened(data: list[bytes]) -> list[EncodedImage]:
    return [open_image(d, MAX_PIXELS) for d in data]


def levels(image_BCHW: torch.Tensor) -> NDArray[np.float64]:
    """8-bit levels of a normalised batch."""
    std, mean = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (STD, MEAN))
    return ((image_BCHW.double() * std + mean) * 255).numpy()


@pytest.fixture(scope="module")
def dali() -> Decoder:
    pytest.importorskip("nvidia.dali")
    return DaliDecoder(SIZE, batch_size=16, device=None)


PHOTOS = [
    encode(photo(0, 400, 300)),
    encode(photo(1, 333, 517)),
    encode(photo(2, 640, 480), subsampling=0),
    encode(photo(3, 101, 99), progressive=True),
    encode(photo(4, 54, 54)),
    encode(photo(5, 54, 54), subsampling=0),
    encode(photo(6, 300, 40)),
    encode(photo(7, 200, 200).convert("L")),
]


@pytest.mark.parametrize("kind", ["train", "crop", "squash"])
def test_dali_agrees_with_pillow(dali: Decoder, kind: str) -> None:
    rng = np.random.default_rng(0)
    augment = AugmentSection(scale=(0.3, 1.0), horizontal_flip=0.5)
    images = opened(PHOTOS * 3)
    sizes = [image.header.size for image in images]
    crops = [
        train_crop(rng, w, h, augment, SIZE) if kind == "train" else eval_crop(w, h, SIZE, kind)  # type: ignore[arg-type]
        for w, h in sizes
    ]
    crops = [crop._replace(exact=True) for crop in crops]  # DALI never decodes at reduced scale
    ours, theirs = dali.decode(images, crops), PillowDecoder(SIZE).decode(images, crops)
    assert ours.broken == theirs.broken == {}
    assert ours.image_BCHW.shape == theirs.image_BCHW.shape == (24, 3, SIZE, SIZE)
    assert ours.image_BCHW.dtype == theirs.image_BCHW.dtype == torch.float32
    difference = np.abs(levels(ours.image_BCHW) - levels(theirs.image_BCHW))
    assert difference.mean() < MEAN_TOLERANCE
    assert np.quantile(difference, 0.999) < P999_TOLERANCE
    assert difference.max() < MAX_TOLERANCE
    # The tolerance is narrow enough to see a window that is off by one pixel.
    moved = [c._replace(offset_left=c.offset_left + 1, resized_width=c.resized_width + 1) for c in crops]
    wrong = PillowDecoder(SIZE).decode(opened(PHOTOS * 3), moved)
    assert np.abs(levels(ours.image_BCHW) - levels(wrong.image_BCHW)).mean() > MEAN_TOLERANCE


def test_dali_keeps_order_and_reports_what_is_broken(dali: Decoder) -> None:
    picture = photo(8, 90, 80)
    whole = encode(picture)
    data = [
        whole,
        whole[:-400],
        encode(picture, "PNG"),
        encode(picture.convert("CMYK")),
        encode(picture, "WEBP"),
        PHOTOS[0],
    ]
    crops = [Crop(0, 0, *open_image(d, MAX_PIXELS).header.size, SIZE, SIZE) for d in data]
    before = dali.num_fallbacks
    ours = dali.decode(opened(data), crops)
    assert ours.broken == {1: "truncated_image"}
    assert dali.num_fallbacks - before == 4
    theirs = PillowDecoder(SIZE).decode(opened(data), crops)
    assert theirs.broken == ours.broken
    assert np.abs(levels(ours.image_BCHW) - levels(theirs.image_BCHW)).mean(axis=(1, 2, 3)).max() < MEAN_TOLERANCE


def test_dali_goes_on_after_it_refused_a_batch(dali: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    # A JPEG whose scan is gone but whose end marker is there passes the check and makes DALI fail.
    whole = encode(photo(9, 64, 64))
    lying = whole[: whole.index(b"\xff\xda")] + b"\xff\xd9"
    images = opened([whole, lying, whole])
    assert all(map(is_complete_jpeg, images))
    crops = [Crop(0, 0, 64, 64, SIZE, SIZE)] * 3
    ours = dali.decode(images, crops)
    theirs = PillowDecoder(SIZE).decode(opened([whole, lying, whole]), crops)
    assert set(ours.broken) == set(theirs.broken) == {1}
    assert torch.equal(ours.image_BCHW, theirs.image_BCHW)
    assert "DALI refused" in caplog.text
    assert dali.decode(opened([whole]), crops[:1]).broken == {}


def test_more_images_than_dalis_batch(dali: Decoder) -> None:
    crops = [Crop(0, 0, 54, 54, SIZE, SIZE, flip=bool(i % 2)) for i in range(40)]
    decoded = dali.decode(opened([PHOTOS[4]] * 40), crops)
    assert torch.equal(decoded.image_BCHW[0], decoded.image_BCHW[38])
    assert torch.equal(decoded.image_BCHW[0], decoded.image_BCHW[39].flip(-1))


@pytest.mark.parametrize("crop_share", [1.0, 0.875, 48 / 54])
@pytest.mark.parametrize("size", [(400, 300), (101, 99), (54, 54), (199, 50)])
def test_eval_crops_equal_torchvision(size: tuple[int, int], crop_share: float) -> None:
    picture = photo(1, *size)
    transform = [v2.Resize(round(SIZE / crop_share), v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)]
    image = open_image(encode(picture, "PNG"), MAX_PIXELS)
    expected = np.asarray(v2.Compose(transform)(picture))
    assert np.array_equal(decode_pixels(image, eval_crop(*size, SIZE, "crop", crop_share), SIZE), expected)
    squashed = np.asarray(v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC)(picture))
    assert np.array_equal(decode_pixels(image, eval_crop(*size, SIZE, "squash"), SIZE), squashed)


def test_a_needle_is_not_blown_up() -> None:
    crop = eval_crop(60_000, 1, SIZE, "crop")
    assert crop.resized_width == 4 * SIZE
    assert abs(crop.left + crop.width / 2 - 30_000) <= 1
    picture = Image.new("RGB", (2000, 1), (10, 20, 30))
    pixels = decode_pixels(open_image(encode(picture, "PNG"), MAX_PIXELS), eval_crop(2000, 1, SIZE, "crop"), SIZE)
    assert (pixels == (10, 20, 30)).all()


def test_train_crop_is_torchvisions_distribution() -> None:
    augment = AugmentSection(scale=(0.2, 0.9), ratio=(0.5, 2.0), horizontal_flip=0.3)
    width, height, count = 200, 120, 3000
    rng = np.random.default_rng(0)
    crops = [train_crop(rng, width, height, augment, SIZE) for _ in range(count)]
    assert all(c.left >= 0 and c.top >= 0 for c in crops)
    assert all(c.left + c.width <= width and c.top + c.height <= height for c in crops)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.2, 0.9], [0.5, 2.0]) for _ in range(count)])
    ours = np.array([(c.top, c.left, c.height, c.width) for c in crops])
    for statistic in (np.mean, np.std):
        # three standard errors of a difference of two samples, roughly
        error = 3 * ours.std(axis=0) * (2 / count) ** 0.5
        assert (np.abs(statistic(ours, axis=0) - statistic(theirs, axis=0)) < error).all()
    assert 0.25 < np.mean([c.flip for c in crops]) < 0.35


def test_train_crop_falls_back_to_the_centre() -> None:
    augment = AugmentSection(scale=(0.9, 1.0))
    crop = train_crop(np.random.default_rng(0), 1000, 10, augment, SIZE)
    assert crop[:4] == ((1000 - 13) // 2, 0, 13, 10)


def test_normalise_is_torchvisions() -> None:
    pixel_HWC = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    expected = v2.functional.normalize(torch.from_numpy(pixel_HWC).permute(2, 0, 1) / 255, list(MEAN), list(STD))
    image_CHW = np.empty((3, 5, 4), np.float32)
    normalise(pixel_HWC.transpose(2, 0, 1), image_CHW)
    torch.testing.assert_close(torch.from_numpy(image_CHW), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- what training trades for speed


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photograph(request: pytest.FixtureRequest) -> Image.Image:
    """A real one, 640 x 427: the levels below are properties of photographs."""
    return Image.fromarray(load_sample_image(request.param))


def training(crop: Crop) -> Crop:
    return crop._replace(exact=False)


@pytest.mark.parametrize("box", [(500, 375), (300, 420), (384, 384), (300, 200)], ids=str)
def test_training_crops_are_resized_as_by_pillow(photograph: Image.Image, box: tuple[int, int]) -> None:
    """In Pillow's order of before release 13, rows first. 300 x 420 is what Pillow 13 does columns first."""
    size, (width, height) = 224, box
    crop = training(Crop(7, 4, width, height, size, size))
    part = photograph.crop((7, 4, 7 + width, 4 + height))
    expected = np.asarray(part.resize((size, height), Image.Resampling.BICUBIC).resize((size, size)))
    ours = decode_pixels(open_image(encode(photograph, "PNG"), MAX_PIXELS), crop, size)
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.01


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_levels_lost_by_decoding_at_reduced_scale(photograph: Image.Image, scale: int, subsampling: int) -> None:
    """With the box just twice as large as the output, where the loss is largest. It is less than a filter's choice."""
    side = photograph.height // scale * scale
    size = side // (2 * scale)
    assert reduced_scale(side, side, size, size) == scale
    crop = Crop(8, 0, side, side, size, size)
    image = open_image(encode(photograph, quality=90, subsampling=subsampling), MAX_PIXELS)
    ours = decode_pixels(image, training(crop), size).astype(int)
    assert image.header.size == photograph.size
    full = decode_pixels(image, crop, size)
    difference = np.abs(ours - full)
    assert 0.1 < difference.mean() < REDUCED_MEAN  # above 0.1: it was decoded at that scale
    assert difference.max() <= REDUCED_MAX
    lanczos = np.asarray(image.header.crop((8, 0, 8 + side, side)).resize((size, size), Image.Resampling.LANCZOS))
    assert difference.mean() < np.abs(lanczos.astype(int) - full).mean()
    # A box that is off by a pixel of the reduced image makes more.
    moved = decode_pixels(image, crop._replace(left=8 + scale), size)
    assert difference.mean() < np.abs(moved.astype(int) - full).mean() / 2


def test_boxes_fit_the_reduced_scale() -> None:
    rng = np.random.default_rng(0)
    augment = AugmentSection(scale=(0.2, 1.0))
    steps = set()
    for _ in range(500):
        width, height = (int(n) for n in rng.integers(20, 1500, 2))
        crop = train_crop(rng, width, height, augment, SIZE)
        step = reduced_scale(*crop[2:6])
        steps.add(step)
        assert all(edge % step == 0 for edge in crop[:4])
        assert min(crop.width, crop.height) // step >= 2 * SIZE or step == 1
        assert crop.left + crop.width <= width and crop.top + crop.height <= height
    assert steps == {1, 2, 4, 8}


def test_a_box_of_the_outputs_size_keeps_its_pixels() -> None:
    """The demo's crops: 48 of 54 pixels."""
    picture = photo(4, 54, 54)
    crop = training(Crop(3, 5, SIZE, SIZE, SIZE, SIZE))
    ours = decode_pixels(open_image(encode(picture, "PNG"), MAX_PIXELS), crop, SIZE)
    assert np.array_equal(ours, np.asarray(picture)[5 : 5 + SIZE, 3 : 3 + SIZE])


@pytest.mark.parametrize("kind", ["L", "CMYK", "progressive", "PNG", "WEBP"])
def test_reduced_scale_knows_all_kinds(photograph: Image.Image, kind: str) -> None:
    data = {
        "L": lambda: encode(photograph.convert("L")),
        "CMYK": lambda: encode(photograph.convert("CMYK")),
        "progressive": lambda: encode(photograph, progressive=True),
        "PNG": lambda: encode(photograph, "PNG"),
        "WEBP": lambda: encode(photograph, "WEBP"),
    }[kind]()
    crop = Crop(64, 8, 400, 416, SIZE, SIZE, flip=True)
    assert reduced_scale(*crop[2:6]) == 4
    fast, full = (PillowDecoder(SIZE).decode(opened([data]), [c]) for c in (training(crop), crop))
    assert fast.broken == full.broken == {}
    difference = np.abs(levels(fast.image_BCHW) - levels(full.image_BCHW))
    assert difference.mean() < REDUCED_MEAN
    assert difference.max() < REDUCED_MAX + 0.1  # fp32


def test_evaluation_decodes_at_full_scale(photograph: Image.Image) -> None:
    data = encode(photograph)
    transform = v2.Compose([v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])
    expected = np.asarray(transform(Image.open(io.BytesIO(data))))
    ours = decode_pixels(open_image(data, MAX_PIXELS), eval_crop(*photograph.size, SIZE, "crop"), SIZE)
    assert np.array_equal(ours, expected)


def test_a_worker_writes_its_batch_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [training(Crop(0, 0, 54, 54, SIZE, SIZE))] * 2
    alone = PillowDecoder(SIZE).decode(opened([PHOTOS[4]] * 2), crops).image_BCHW
    assert not alone.is_shared()
    monkeypatch.setattr("megaeva.data.decode_pillow.get_worker_info", lambda: "a worker")
    shared = PillowDecoder(SIZE).decode(opened([PHOTOS[4]] * 2), crops).image_BCHW
    assert shared.is_shared() and shared.is_contiguous()
    assert torch.equal(alone, shared)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"GIF89a" + bytes(50), "not_an_image"),
        (b"\xff\xd8\xff\xe0", "damaged_image"),
        (PHOTOS[0][:60], "damaged_image"),
        (png_header(60_000, 60_000), "decompression_bomb"),
        (encode(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"), "unsupported_mode"),
    ],
    ids=["empty", "gif", "stub", "header_cut", "bomb", "sixteen_bits"],
)
@pytest.mark.filterwarnings("error")
def test_headers_tell_what_cannot_be_used(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        open_image(data, MAX_PIXELS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PHOTOS[0][: len(PHOTOS[0]) // 2], "truncated_image"),
        (png_header(100, 100), "truncated_image"),
        (encode(photo(1, 50, 50), "PNG")[:900], "truncated_image"),
    ],
    ids=["jpeg", "png_without_pixels", "png"],
)
@pytest.mark.parametrize("exact", [True, False])
def test_pillow_reports_truncated_pixels(data: bytes, reason: str, exact: bool) -> None:
    good = open_image(PHOTOS[4], MAX_PIXELS)
    bad = open_image(data, MAX_PIXELS)
    crops = [Crop(0, 0, *image.header.size, SIZE, SIZE, exact=exact) for image in (bad, good)]
    decoded = PillowDecoder(SIZE).decode([bad, good], crops)
    assert decoded.broken == {0: reason}
    assert len(decoded.image_BCHW) == 1


def test_auto_is_pillow_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_decoder("auto", SIZE, batch_size=2, log=True).name == "pillow"
    assert len(caplog.records) == 1
    assert "no GPU" in caplog.text
