"""What an FP8 recipe must hold, told before anything starts."""

from pathlib import Path

import pytest

from megaeva.config import load
from megaeva.config.fp8 import fp8_line
from megaeva.errors import ConfigError, UserError
from megaeva.model.fp8 import require_fp8

TEXT = """\
task: contrastive
run_dir: runs/x
model: {variant: EVA-CLIP-18B}
data: {train: [a.tar]}
optim: {vision: {lr: 0.001}}
train: {total_samples: 6400, global_batch_size: 64, precision: fp8}
"""
L14 = ["model.variant=EVA02-CLIP-L-14"]


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


BROKEN = [
    (L14, ["train.fp8.linears", "must leave out fc1 and fc2: FP8 with recipe=delayed needs features in multiples of 16",
           "fc1 of vision has 5460 (parallel.vision.tp=1), fc2 of vision has 2730 (parallel.vision.tp=1); "
           "set train.fp8.linears=[qkv, proj]."]),
    (["model.text.ffn_hidden_size=5136", "train.fp8.recipe=mxfp8"],
     ["must leave out fc1 and fc2: ", "multiples of 32", "fc1 of text has 5136 (parallel.text.tp=1)"]),
    (["model.vision.ffn_hidden_size=15392", "parallel.vision.tp=2", "train.fp8.recipe=mxfp8"],
     ["fc1 of vision has 7696", "set train.fp8.linears=[qkv, proj], or a smaller tp."]),
    (["train.fp8.linears=[]"], ["train.fp8.linears=[] (command line) must name at least one"]),
    (["train.fp8.first_layers_bf16=40", "train.fp8.last_layers_bf16=40"],
     ["train.precision=fp8", "must leave linears in FP8", "model.vision.num_layers=48", "train.precision=bf16"]),
    (["train.fp8.min_features=100000"], ["must leave linears in FP8", "min_features=100000"]),
    (["train.fp8.recipe=current", "train.fp8.amax_history=16"],
     ["train.fp8.amax_history=16", "must be absent with train.fp8.recipe=current", "set train.fp8.recipe=delayed"]),
    (["platform=cpu"], ["must not be fp8 with platform=cpu", "set train.fp8.rehearse=true"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "parts"), BROKEN, ids=lambda value: value[0])
def test_a_broken_rule_is_told(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    path = recipe(tmp_path)
    load(path)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert str(caught.value).count("must leave out") <= 1, "two would advise against each other"
    load(path, [*overrides, "train.precision=bf16"])  # a section that is not in use may hold anything


def test_a_machine_without_a_gpu_must_be_allowed_to_rehearse(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with pytest.raises(UserError, match=r"on a CPU, which has no FP8.*train\.fp8\.rehearse=true"):
        require_fp8(load(path).train.fp8_in_use, "local")
    require_fp8(load(path, ["platform=cpu", "train.fp8.rehearse=true"]).train.fp8_in_use, "local")
    require_fp8(load(path, ["train.precision=bf16"]).train.fp8_in_use, "local")


def test_the_line_at_the_start_counts_linears(tmp_path: Path) -> None:
    cfg = load(recipe(tmp_path), ["train.fp8.linears=[qkv, fc1]", "train.fp8.amax_history=16"])
    line = fp8_line(cfg, emulated=False)
    assert line == ("FP8 (delayed, hybrid, max of 16 steps): 92 of 192 linears of vision, 60 of 128 linears of text")
    assert "emulated on the CPU" in (fp8_line(cfg, emulated=True) or "")
    assert fp8_line(load(recipe(tmp_path), ["train.precision=bf16"]), emulated=False) is None
