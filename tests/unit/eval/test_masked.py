"""The masked-prediction score: right rows compared with right rows, and a picture file that says the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megaeva.config.schema import Config
from megaeva.data.synthetic import make_shards
from megaeva.eval.masked import evaluate_masked, masked_cosine, masks
from megaeva.parallel.grid import grid_of_one


class FakeTeacher(nn.Module):
    """Four patches a side; the feature of a patch is its mean colour."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image_BCHW, 12).flatten(2).transpose(1, 2)


class FakeStudent(nn.Module):
    """Knows the answer up to the angle whose cosine is given."""

    def __init__(self, cosine: float) -> None:
        super().__init__()
        self.cosine = cosine

    def predict(self, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
        assert not self.training
        target_ME = FakeTeacher()(image_BCHW)[mask_BN]
        aside_ME = torch.linalg.cross(target_ME, torch.ones(3).expand_as(target_ME))
        aside_ME = aside_ME / aside_ME.norm(dim=1, keepdim=True) * target_ME.norm(dim=1, keepdim=True)
        return 3 * (self.cosine * target_ME + (1 - self.cosine**2) ** 0.5 * aside_ME)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=7)
    tower = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64, "activation": "gelu"}
    raw = {
        "task": "mim",
        "run_dir": str(tmp_path),
        "platform": "cpu",
        "model": {
            "embed_dim": 16,
            "vision": tower | {"image_size": 48, "patch_size": 12, "qkv_bias": "qkv"},
            "text": tower,
        },
        "teacher": {"checkpoint": "x"},
        "mim": {"mask": {"num_masked": 6, "min_block": 1}},
        "data": {"decoder": "pillow"},
        "optim": {"vision": {"lr": 1e-3}},
        "train": {"total_samples": 8, "global_batch_size": 8},
        "eval": {"batch_size": 4, "retrieval": {"shapes": {"shards": [str(tmp_path / "shards" / "*.tar")]}}},
    }
    return Config.model_validate(raw)


def test_cosine_of_a_known_student(config: Config, tmp_path: Path) -> None:
    student = FakeStudent(0.6).train()
    path = tmp_path / "masked.json"
    cpu = torch.device("cpu")
    results = evaluate_masked(student, FakeTeacher(), config, grid=grid_of_one(), device=cpu, examples=path)
    assert results == {"mim/shapes": {"cosine": pytest.approx(0.6, abs=1e-5)}}
    assert student.training
    stored = json.loads(path.read_text())
    assert (stored["set"], stored["grid"], len(stored["examples"])) == ("shapes", 4, 8)
    for example in stored["examples"]:
        assert len(example["cosine"]) == 16
        shown = [c for c in example["cosine"] if c is not None]
        assert 0 < len(shown) <= 6
        assert shown == pytest.approx([0.6] * len(shown), abs=2e-3)


def test_masks_depend_on_the_place_only(config: Config) -> None:
    together, alone = masks(config, (3, 4, 5)), masks(config, (4,))
    assert together.shape == (3, 16)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1]) or not torch.equal(together[1], together[2])


def test_rows_follow_the_mask() -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 48, 48)).astype(np.float32))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, 2] = mask[1, 9] = True
    assert masked_cosine(FakeStudent(0.8).eval(), FakeTeacher(), image, mask).tolist() == pytest.approx([0.8] * 3)
