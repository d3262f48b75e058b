"""Images per second of the loader beside open_clip's pipeline: webdataset, Pillow, torchvision, its own tokenizer.

Both read the same shards with as many worker processes and give batches of the same kind: RandomResizedCrop to fp32
images normalised with the CLIP mean and deviation, and token rows.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from megaeva.bench.compare import Comparison, milliseconds, row
from megaeva.bench.photos import photo_shards
from megaeva.config.schema import Config, DataSection, ModelSection, OptimSection, TowerOptimSection, TrainSection
from megaeva.data.decode_pillow import PillowDecoder, open_image
from megaeva.data.loader import Loader
from megaeva.data.shards import read_shard
from megaeva.data.tokenizer import Tokenizer
from megaeva.data.transforms import MEAN, STD, train_crop

SHUFFLE_BUFFER = 512  # samples, on each worker
# Of 255: mean difference of pixels from the peer's transform; a crop moved by one pixel makes more. Where Pillow
# resizes columns before rows it rounds and clips in another order (seen: 0.003, at 336 pixels 0.06).
MAX_MEAN_LEVELS = 0.25
NUM_BATCHES = 20  # of a round of one side
_BATCHES_READY = 4  # of each worker, at most: prefetched, and being built
_NUM_COMPARED = 64  # images

Pair = tuple[Tensor, Tensor | None]  # image_BCHW, token_BL


@dataclass(frozen=True)
class DataTimes:
    """What `benchmark_data` measured.

    Attributes:
        timed: milliseconds of a batch.
        max_levels, mean_levels: difference of our pixels from the peer's transform of the same crop, of 255 levels.
    """

    batch_size: int
    timed: Comparison
    max_levels: float
    mean_levels: float

    def report(self, command: str) -> list[str]:
        """A sentence, and the row for the log's table of loaders: date, commit, command, images/s twice, ratio."""
        ours, peer = (1e3 * self.batch_size / ms for ms in (self.timed.ours, self.timed.peer))
        ratio = self.timed.peer_per_ours
        return [
            f"our loader {ours:.0f} images/s, webdataset and Pillow {peer:.0f} images/s, ours / peer {ratio}; pixels "
            f"of one crop differ by {self.mean_levels:.4f} of 255 levels on average, by {self.max_levels:.0f} at most",
            row(f"`{command}`", f"{ours:.0f}", f"{peer:.0f}", str(ratio)),
        ]


def benchmark_data(model: ModelSection, *, batch_size: int, num_workers: int, num_rounds: int) -> DataTimes:
    """Times both loaders in turns, after checking that both do the same work.

    Args:
        num_workers: processes of each side; while one is timed those of the other wait with their batches ready.

    Raises:
        UserError: a package that the benchmark's shards are made from is not installed.
    """
    cfg = recipe(model, photo_shards(), batch_size, num_workers)
    max_levels, mean_levels = compare_work(cfg)
    # The peer first: its workers are forked, which is best done before ours have started threads here.
    peer = peer_batches(cfg)
    ours_loader = Loader(cfg, data_rank=0, data_size=1, num_patches=model.vision.num_patches)
    ours: Iterator[Pair] = ((batch.image_BCHW, batch.token_BL) for batch in ours_loader)
    try:
        for pair in (next(peer), next(ours)):
            check_batch(pair, cfg)
        times: dict[int, list[float]] = {0: [], 1: []}
        for number in range(num_rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side].append(_time((ours, peer)[side], num_workers))
    finally:
        ours_loader.close()
    return DataTimes(batch_size, Comparison(tuple(times[0]), tuple(times[1])), max_levels, mean_levels)


def recipe(model: ModelSection, shards: Sequence[Path], batch_size: int, num_workers: int) -> Config:
    """A contrastive recipe over `shards` with the schema's defaults: crops of 90 to 100 % of the area."""
    return Config(
        task="contrastive",
        run_dir="unused",
        platform="cpu",
        model=model,
        data=DataSection(
            train=tuple(map(str, shards)), decoder="pillow", num_workers=num_workers, shuffle_buffer=SHUFFLE_BUFFER
        ),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-5), logit_scale_lr=1e-5),
        train=TrainSection(total_samples=batch_size * 1_000_000_000, global_batch_size=batch_size),
    )


def peer_batches(cfg: Config) -> Iterator[Pair]:
    """Endless batches of open_clip 3.3.0's training pipeline: open_clip_train/data.py, get_wds_dataset, resampled."""
    import webdataset as wds

    tokenize = _peer_tokenizer(cfg)
    dataset = wds.DataPipeline(
        wds.ResampledShards(list(cfg.data.train)),
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=cfg.data.shuffle_buffer, initial=cfg.data.shuffle_buffer),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=_peer_transform(cfg), text=lambda text: tokenize(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(cfg.train.global_batch_size, partial=False),
    )
    # A context, though it is Linux's default: spawned workers could not be given the pipeline.
    loader = wds.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=cfg.data.num_workers, multiprocessing_context="fork"
    )
    return ((image_BCHW, token_BL) for image_BCHW, token_BL in loader)


def _peer_transform(cfg: Config) -> Callable[[Image.Image], Tensor]:
    from open_clip.transform import image_transform

    aug_cfg = {"scale": cfg.data.augment.scale}
    transform: Callable[[Image.Image], Tensor] = image_transform(cfg.model.vision.image_size, True, aug_cfg=aug_cfg)
    return transform


def _peer_tokenizer(cfg: Config) -> Callable[[str], Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Any = SimpleTokenizer(context_length=cfg.model.text.context_length)
    return tokenizer  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------- equal work


def compare_work(cfg: Config) -> tuple[float, float]:
    """Largest and mean difference, of 255 levels, between our pixels and those of the peer's transform at our crops.

    Fails when the mean is above `MAX_MEAN_LEVELS`, or when a caption's tokens differ.
    """
    from torchvision.transforms import functional

    size = cfg.model.vision.image_size
    samples = list(itertools.islice(read_shard(Path(cfg.data.train[0])), _NUM_COMPARED))
    images = [open_image(sample.image or b"", cfg.data.max_image_pixels) for sample in samples]
    rng = np.random.default_rng(0)
    crops = [train_crop(rng, *image.header.size, cfg.data.augment, size) for image in images]
    theirs = []
    for image, crop in zip(images, crops):
        box = crop.top, crop.left, crop.height, crop.width
        picture = functional.resized_crop(
            image.header.convert("RGB"), *box, [size, size], functional.InterpolationMode.BICUBIC
        )
        theirs.append(functional.normalize(functional.to_tensor(picture), list(MEAN), list(STD)))
    ours = PillowDecoder(size).decode(images, crops)
    assert not ours.broken, ours.broken
    difference = (ours.image_BCHW - torch.stack(theirs)).abs() * torch.tensor(STD)[:, None, None] * 255
    max_levels, mean_levels = difference.max().item(), difference.mean().item()
    assert mean_levels <= MAX_MEAN_LEVELS, mean_levels
    captions = [sample.files["txt"].decode() for sample in samples]
    assert torch.equal(Tokenizer(cfg.model.text.context_length)(captions), _peer_tokenizer(cfg)(captions))  # type: ignore[arg-type]
    return max_levels, mean_levels


def check_batch(pair: Pair, cfg: Config) -> None:
    """Fails when a batch is not fp32 images of the recipe's size and int64 tokens."""
    image_BCHW, token_BL = pair
    assert token_BL is not None
    size, batch_size = cfg.model.vision.image_size, cfg.train.global_batch_size
    assert (image_BCHW.shape, image_BCHW.dtype) == ((batch_size, 3, size, size), torch.float32)
    assert (token_BL.shape, token_BL.dtype) == ((batch_size, cfg.model.text.context_length), torch.int64)
    assert image_BCHW.is_contiguous()
    assert -2 < image_BCHW.min() < -0.5 < 0.5 < image_BCHW.max() < 2.2


# ------------------------------------------------------------------------------------------------------------ timing


def _time(batches: Iterator[Pair], num_workers: int) -> float:
    """Milliseconds of a batch, of `NUM_BATCHES` that are built while the other side's workers are idle."""
    _wait_until_idle()
    for _ in range(_BATCHES_READY * num_workers):  # those built while nobody was timing
        next(batches)
    return milliseconds(lambda: [next(batches) for _ in range(NUM_BATCHES)], "cpu") / NUM_BATCHES


def _wait_until_idle() -> None:
    """Returns when no worker process of either side computes: all have their batches ready."""
    children = psutil.Process().children(recursive=True)
    before = None
    while before != (now := [sum(child.cpu_times()[:2]) for child in children]):
        before = now
        time.sleep(0.3)
