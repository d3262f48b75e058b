"""Teacher, distillation and student as three tiny runs: what each start loads, what is fresh, and that bf16 trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import Config
from megaeva.data.synthetic import make_shards
from megaeva.errors import ConfigError, UserError
from megaeva.model.init import init_weights
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.runtime import start
from megaeva.trainer import Trainer

# EVA-02's flags: the norm inside attention is a part of the CLIP that its distillation lacks.
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 40,
    "activation": "swiglu", "qkv_bias": "qv", "sub_ln_attention": True, "sub_ln_mlp": True, "rope": True,
    "head_bias": True,
}  # fmt: skip
TEXT = {"context_length": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64}
MIM: dict[str, Any] = {"mask": {"num_masked": 6, "min_block": 2}, "stop_grad_patch_embed": 0.1}
STEPS = 4


def train(folder: Path, name: str, precision: str, **other: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """A finished run and its weights by checkpoint key, before training."""
    cfg = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": str(folder / name),
            "platform": "cpu",
            "seed": 3,
            "model": {"embed_dim": 16, "vision": VISION, "text": TEXT},
            "data": {"train": [str(folder / "shards" / "*.tar")], "shuffle_buffer": 16},
            "optim": {"name": "lamb", "vision": {"lr": 1e-2}, "clip_grad_norm": 1.0},
            "train": {
                "total_samples": 8 * STEPS, "global_batch_size": 8, "micro_batch_size": 4,
                "precision": precision, "log_every_steps": 1,
            },
        }
        | other
    )  # fmt: skip
    trainer = Trainer(cfg, start("cpu"), resume=False, recipe_changes=[])
    before = weights(trainer)
    assert trainer.fit() == 0
    return trainer, before


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        (name if tower.name == "student" else f"{tower.name}.{name}"): parameter.detach().clone()
        for tower in trainer.task.towers
        for name, parameter in tower.module.named_parameters()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=20, image_size=40, seed=0)
    return tmp_path


def mim_recipe(folder: Path, **vision: Any) -> dict[str, Any]:
    return {
        "task": "mim",
        "mim": MIM,
        "teacher": {"checkpoint": str(folder / "teacher")},
        "model": {"embed_dim": 16, "vision": VISION | vision, "text": TEXT},
        "optim": {"vision": {"lr": 1e-2}},
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_chain_hands_on(folder: Path, precision: str) -> None:
    teacher, at_first = train(folder, "teacher", precision)
    teacher_end = weights(teacher)
    assert teacher_end["scale.log_scale"].dtype == torch.float32
    assert teacher_end["vision.head.weight"].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    moved = [name for name, value in teacher_end.items() if not torch.equal(value, at_first[name])]
    assert len(moved) > 0.8 * len(at_first), "training changes the weights"

    mim, _ = train(folder, "mim", precision, **mim_recipe(folder, sub_ln_attention=False, drop_path=0.1))
    mim_end = weights(mim)
    losses = [line["loss"] for line in read_metrics(folder / "mim") if "loss" in line]
    assert all(-1 <= loss <= 1 for loss in losses)

    init = {"vision": str(folder / "mim"), "text": str(folder / "teacher")}
    student, student_start = train(folder, "student", precision, init=init)
    # A whole CLIP keeps everything, its scale and heads too.
    _, again = train(folder, "again", precision, init={"clip": str(folder / "student")})
    student_end = weights(student)
    assert again.keys() == student_end.keys()
    assert all(torch.equal(value, student_end[name]) for name, value in again.items())
    fresh_model = student.task.model  # type: ignore[attr-defined]
    init_weights(fresh_model, seed=3, task="contrastive", grid=student.task.grid)
    fresh = {name: parameter.detach() for name, parameter in fresh_model.named_parameters()}
    for name, value in student_start.items():
        is_fresh = name.startswith(("vision.head", "text.head")) or "self_attention.inner_norm" in name
        if name == "scale.log_scale":
            assert value.item() == pytest.approx(2.6592600369327783)
            continue
        source = fresh if is_fresh else mim_end if name.startswith("vision.") else teacher_end
        assert torch.equal(value, source[name]), name
    report = "\n".join(line for report in student.task.start_reports for line in report.lines())
    for part in ("fresh: vision.blocks.layers.0.self_attention.inner_norm", "lm_head.bias", "fresh: text.head.weight"):
        assert part in report


def test_a_distilled_attention_norm_is_kept(folder: Path) -> None:
    train(folder, "teacher", "fp32")
    mim, _ = train(folder, "mim", "fp32", **mim_recipe(folder))
    _, begun = train(folder, "student", "fp32", init={"vision": str(folder / "mim")})
    name = "vision.blocks.layers.1.self_attention.inner_norm.weight"
    assert not (begun[name] == 1).all()
    assert torch.equal(begun[name], weights(mim)[name])


def test_a_teacher_of_another_image_size_is_refused(folder: Path) -> None:
    train(folder, "teacher", "fp32")
    # 16 patches as well, but the teacher would see 64 px images.
    with pytest.raises(ConfigError, match=r"32 px images in patches of 8 px, the student model\.vision 64 px"):
        train(folder, "mim", "fp32", **mim_recipe(folder, image_size=64, patch_size=16))


def test_a_gradient_that_is_not_finite_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaeva.optim.tower_optimizer.TowerOptimizers.get_grad_norm", lambda self: float("inf"))
    with pytest.raises(UserError, match=r"step 0: grad_norm=inf; it must be finite"):
        train(folder, "run", "fp32")
    assert (folder / "run" / "bad_batch_step_0.json").exists()
    assert not list((folder / "run").glob("checkpoints/step_*"))


def test_the_clock_asks_for_checkpoints_too(folder: Path) -> None:
    train(folder, "run", "fp32", save={"every_steps": None, "every_minutes": 1e-9, "keep": 3})
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert names == [f"step_0000000{step}" for step in range(STEPS - 2, STEPS + 1)]
