"""The recipes of the published models, shrunken: each takes a step, and starts from what the one before it saved.

Sizes, lengths, axes and where data come from are set; everything else is the recipe's: precision, optimizer, rates,
layer decay, norms, biases, dropout, starts, phases.
"""

import io
import math
import tarfile
from pathlib import Path

import pytest
import torch

from megaeva.config import load
from megaeva.config.schema import Config
from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.runtime import Runtime
from megaeva.trainer import Trainer
from tests.helpers.videos import grey_video

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BATCH = 4
SHRUNKEN = (
    "platform=cpu", "data.num_workers=0", "parallel.vision.tp=1", "optim.warmup_steps=0",
    "train.log_every_steps=1",
    f"train.total_samples={BATCH}", f"train.global_batch_size={BATCH}", "train.micro_batch_size=2",
    "model.embed_dim=16",
    "model.vision.image_size=32", "model.vision.patch_size=8", "model.vision.hidden_size=32",
    "model.vision.num_layers=2", "model.vision.num_heads=4", "model.vision.ffn_hidden_size=44",
    "model.text.context_length=16", "model.text.hidden_size=32", "model.text.num_layers=1", "model.text.num_heads=4",
    "model.text.ffn_hidden_size=64",
)  # fmt: skip
OF_MIM = ("parallel.teacher.tp=1", "mim.mask.num_masked=6", "mim.mask.min_block=2")
OF_CLIP = ("parallel.text.tp=1",)
# In an order in which what a recipe starts from is there; files in weights/ are those that a reader downloads.
RUNS: dict[str, tuple[str, ...]] = {
    "clip_eva02_e14plus": ("init.vision=null", "init.text=null"),
    "mim_eva01_g14": ("teacher.checkpoint=runs/clip_eva02_e14plus",),
    "mim_eva02_b": ("teacher.checkpoint=runs/clip_eva02_e14plus",),
    "clip_eva02_b16": (
        "init.vision=runs/mim_eva02_b", "init.text=null", "model.vision.image_size=64", "model.vision.patch_size=16",
    ),
    "mim_eva02_l14": ("teacher.checkpoint=runs/clip_eva02_e14plus",),
    "clip_eva02_l14": ("init.text=null",),
    "mim_eva_8b": (),
    "clip_eva_8b": (),
    "clip_eva_8b_448": ("model.vision.image_size=64",),
    "mim_eva_18b": (),
    "clip_eva_18b": (
        *(f"data.phases.{index}.samples={BATCH}" for index in range(3)), f"train.total_samples={3 * BATCH}",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `data/...` and `runs/...` of the recipes are."""
    folder = tmp_path_factory.mktemp("recipes")
    make_shards(folder / "images", num_shards=1, samples_per_shard=12, image_size=40)
    (folder / "data").mkdir()
    for name in (
        "merged-2b",
        "merged-2b-0.6b",
        "laion-coco-20m",
        "laion-2b",
        "imagenet-21k",
        "merged-30m",
        "merged-38m",
    ):
        (folder / "data" / name).symlink_to(folder / "images")
    (folder / "data" / "merged-video").mkdir()
    with tarfile.open(folder / "data" / "merged-video" / "0.tar", "w") as tar:
        for number in range(BATCH):
            for extension, content in (("mp4", grey_video(9 + number)), ("txt", b"it gets lighter")):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def shrunken(name: str) -> Config:
    task = OF_MIM if name.startswith("mim") else OF_CLIP
    return load(RECIPES / f"{name}.yaml", [*SHRUNKEN, *task, *RUNS[name]])


def test_every_recipe_takes_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    monkeypatch.chdir(folder)
    for name in RUNS:
        cfg = shrunken(name)
        trainer = Trainer(cfg, runtime, resume=False, recipe_changes=[])
        before = {t.name: [p.detach().clone() for p in t.module.parameters()] for t in trainer.task.towers}
        assert trainer.fit() == 0
        for tower in trainer.task.towers:
            moved = [not torch.equal(*pair) for pair in zip(before[tower.name], tower.module.parameters(), strict=True)]
            frozen = tower.name == "scale" and not cfg.model.logit_scale.trainable
            assert any(moved) is not frozen, (name, tower.name)
        check(cfg, name)


def check(cfg: Config, name: str) -> None:
    lines = [line for line in read_metrics(Path(cfg.run_dir)) if "loss" in line]
    assert [line.get("phase") for line in lines] == ([1, 2, 3] if name == "clip_eva_18b" else [None])
    for line in lines:
        assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf, name
    student = "student" if cfg.task == "mim" else "vision"
    assert lines[0][f"lr/{student}"] == pytest.approx(cfg.optim.vision.lr)
    if cfg.task == "contrastive":
        assert cfg.optim.text is not None and lines[0]["lr/text"] == pytest.approx(cfg.optim.text.lr)
        constant = not cfg.model.logit_scale.trainable
        assert lines[-1]["logit_scale"] == pytest.approx(100 if constant else 1 / 0.07, rel=1e-6 if constant else 1e-2)
