"""A loop at no cost: real recipes and ledger, stages that write what a training job leaves and train nothing."""

import json
from pathlib import Path

import pytest
import yaml

from megaeva.config import load, load_loop
from megaeva.config.schema import LoopConfig

CLIP = {
    "task": "contrastive",
    "run_dir": "unused",
    "model": {"variant": "Demo-Teacher"},
    "data": {"train": ["data/*.tar"], "tokenizer_subset": "vocab.json"},
    "optim": {"vision": {"lr": 1e-3}},
    "train": {"total_samples": 640, "global_batch_size": 64},
    "eval": {"retrieval": {"heldout": {"shards": ["h/*.tar"]}}},
}
MIM = {
    "task": "mim",
    "run_dir": "unused",
    "model": {"variant": "Demo-Student"},
    "teacher": {"checkpoint": "unused"},
    "mim": {"mask": {"num_masked": 6, "min_block": 2}},
    "data": {"train": ["data/*.tar"], "tokenizer_subset": "vocab.json"},
    "optim": {"vision": {"lr": 1e-3}},
    "train": {"total_samples": 320, "global_batch_size": 64},
}


def make_checkpoint(run_dir: Path) -> None:
    """What counts as a finished checkpoint."""
    folder = run_dir / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "megaeva.json").write_text("{}")


class FakeLoop:
    """Recipes in a folder, and a `launch` that records its calls instead of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "runs"
        self.path = folder / "loop.yaml"
        self.calls: list[tuple[str, bool]] = []
        self.fail_at: str | None = None
        self.leave_checkpoint = True
        (folder / "clip.yaml").write_text(yaml.safe_dump(CLIP))
        (folder / "mim.yaml").write_text(yaml.safe_dump(MIM))
        student = {"recipe": "clip.yaml", "set": {"model.variant": "Demo-Student", "train.total_samples": 1280}}
        self.recipe: dict = {
            "run_dir": str(self.run_dir),
            "seed": 7,
            "teacher": {"stage": {"recipe": "clip.yaml"}},
            "rounds": [
                {
                    "name": name,
                    "distil": {"recipe": "mim.yaml"},
                    "clip": student,
                    "controls": {
                        "scratch": student | {"set": student["set"] | {"init.text": "{teacher}"}},
                        "long_teacher": {"recipe": "clip.yaml", "set": {"train.total_samples": 2240}},
                    },
                }
                for name in ("one", "two")
            ],
            "report": False,
        }

    def config(self) -> LoopConfig:
        self.path.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return load_loop(self.path)

    make_checkpoint = staticmethod(make_checkpoint)

    def launch(self, recipe, overrides, launch, log_path, resume=False, *, stage="train") -> None:
        self.calls.append((stage, resume))
        config = load(recipe, overrides)
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if stage != self.fail_at or self.leave_checkpoint:
            make_checkpoint(run_dir)
        if stage == self.fail_at:
            raise RuntimeError("this stage dies")
        (run_dir / "finished.json").write_text(json.dumps({"num_parameters": 100 + len(stage), "samples": 1}))
        if config.task == "contrastive":
            recall = round(0.01 * len(self.calls), 4)
            result = {"retrieval/other": {"mean_recall": 0.0, "image_to_text_r1": 0.0}}
            result["retrieval/heldout"] = {"mean_recall": recall, "image_to_text_r1": recall / 2}
            result["zero_shot/heldout"] = {"top1": recall / 4, "top5": recall / 3}
            (run_dir / "eval.json").write_text(json.dumps(result))


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    fake = FakeLoop(tmp_path)
    monkeypatch.setattr("megaeva.loop.weak_to_strong.launch", fake.launch)
    return fake
