"""clip_benchmark, unmodified, evaluates an open_clip export on a local webdataset task and finds our numbers."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.config.schema import Config
from megaeva.data.evaluation import eval_batches
from megaeva.data.prepare.pack import Sample, json_bytes, write_shards
from megaeva.data.tokenizer import Tokenizer, build_subset
from megaeva.eval.harness import evaluate
from megaeva.eval.zero_shot import class_vectors, read_classes
from megaeva.model import CLIPModel
from tests.helpers.clip_benchmark_task import run_clip_benchmark, write_task
from tests.helpers.exports import export, random_clip, state_of
from tests.helpers.tiny import single_grid, tiny

NAMES = ["red panda", "café table", "grinning face", "left arrow", "tuk-tuk", "l'orange", "ship"]
TEMPLATES = ["a photo of a {}.", "{}!"]
IMAGE_SIZE = 24
NUM_IMAGES = 60
CAPTIONS = [f"{NAMES[number % len(NAMES)]} {'!' * (number // len(NAMES))}" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def trained(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, CLIPModel]:
    """A folder of shards with their labels, a recipe, and a model that is right about half of the images."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "classes.json").write_text(json.dumps({"classes": NAMES, "templates": TEMPLATES}))
    classes = read_classes(folder / "classes.json")
    prompts = [prompt for name in NAMES for prompt in classes.prompts(name)]
    subset: dict[str, Any] = build_subset([*prompts, *CAPTIONS])
    (folder / "vocab.json").write_text(json.dumps(subset))
    tokenizer = Tokenizer(16, folder / "vocab.json")
    cfg = tiny("Demo-Teacher", image_size=IMAGE_SIZE, patch_size=6)
    text = cfg.text.model_copy(update={"context_length": 16, "vocab_size": tokenizer.vocab_size + 3})
    cfg = cfg.model_copy(update={"text": text})
    model = random_clip(cfg)

    _write(folder / "unlabelled", lambda number: 0)
    images = torch.cat([batch.image_BCHW for batch in _batches(folder / "unlabelled")])
    with torch.no_grad():
        vectors = class_vectors(lambda texts: model.encode_text(tokenizer(texts)), classes, NAMES)
        found = (torch.nn.functional.normalize(model.encode_image(images), dim=-1) @ vectors.T).argmax(1)
    _write(folder / "labelled", lambda number: (int(found[number]) + number % 2) % len(NAMES))
    shards = [str(folder / "labelled" / "*.tar")]
    recipe = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": str(folder / "run"),
            "model": cfg.model_dump(),
            "data": {"tokenizer_subset": str(folder / "vocab.json"), "decoder": "pillow"},
            "optim": {"vision": {"lr": 1e-3}},
            "train": {"total_samples": 1, "global_batch_size": 1, "precision": "fp32"},
            "eval": {
                "zero_shot": {"set": {"shards": shards, "classes": str(folder / "classes.json")}},
                "retrieval": {"set": {"shards": shards}},
                "batch_size": 16,
            },
        }
    )
    what = Contents("clip", cfg, clip_ids=tuple(subset["clip_ids"]))
    export(OPEN_CLIP, what, state_of(model), folder / "export")
    return folder, recipe, model


def _write(folder: Path, label: Callable[[int], int]) -> None:
    """Wide, smooth pictures, so that resizing and cutting matter; every caption is its own."""
    rng = np.random.default_rng(0)

    def samples() -> Sequence[Sample]:
        made = []
        for number in range(NUM_IMAGES):
            small = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC).save(content, "JPEG")
            label_of = json_bytes({"class": label(number)})
            parts = {"jpg": content.getvalue(), "txt": CAPTIONS[number].encode(), "json": label_of}
            made.append(Sample(f"{number:03d}", parts))
        return made

    write_shards(folder, samples(), samples_per_shard=25)


def _batches(folder: Path) -> Any:
    return eval_batches(
        [str(folder / "*.tar")], image_size=IMAGE_SIZE, resize="crop", batch_size=16, data_rank=0, data_size=1,
        tokenizer=None, decoder="pillow",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(trained: tuple[Path, Config, CLIPModel]) -> dict[str, dict[str, float]]:
    """Our own figures."""
    _, recipe, model = trained
    return evaluate(model, recipe, grid=single_grid(), device=torch.device("cpu"))


def test_retrieval(trained: tuple[Path, Config, CLIPModel], ours: dict[str, dict[str, float]], tmp_path: Path) -> None:
    folder, recipe, _ = trained
    task = write_task(recipe.eval.retrieval["set"].shards, tmp_path / "task", "zeroshot_retrieval")
    theirs = run_clip_benchmark(folder / "export", task, "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    mine = ours["retrieval/set"]
    assert mine["image_to_text_r10"] > mine["image_to_text_r1"] > 0
    for k in (1, 5, 10):
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(mine[f"text_to_image_r{k}"])
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(mine[f"image_to_text_r{k}"])


def test_zero_shot(trained: tuple[Path, Config, CLIPModel], ours: dict[str, dict[str, float]], tmp_path: Path) -> None:
    folder, recipe, _ = trained
    section = recipe.eval.zero_shot["set"]
    task = write_task(section.shards, tmp_path / "task", "zeroshot_classification", Path(section.classes))
    theirs = run_clip_benchmark(folder / "export", task, "zeroshot_classification")
    assert 0 < ours["zero_shot/set"]["top1"] < ours["zero_shot/set"]["top5"] < 1
    assert theirs["acc1"] == pytest.approx(ours["zero_shot/set"]["top1"])
    assert theirs["acc5"] == pytest.approx(ours["zero_shot/set"]["top5"])
