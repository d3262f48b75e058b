"""The drawing of a layout; that its numbers are true is in tests/parallel/test_topology_counts.py."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megaeva.checkpoint.layout import FORMAT, INFO_NAME
from megaeva.config.schema import Config
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError
from megaeva.model import count_parameters
from megaeva.planning.topology import holdings, topology_lines


def config(variant: str = "EVA-CLIP-18B", *, batch: int = 96, micro: int | None = 4, **more: Any) -> Config:
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "unused",
            "model": {"variant": variant} | VARIANTS[variant],
            "optim": {"vision": {"lr": 1e-3}},
            "train": {"total_samples": 960, "global_batch_size": batch, "micro_batch_size": micro},
        }
        | more
    )


def test_a_pipeline_is_drawn_stage_by_stage() -> None:
    layout = {"vision": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, "text": {"tp": 5, "recompute": 3}}
    lines = topology_lines(config(parallel=layout, batch=160), 40)
    assert max(map(len, lines)) < 100
    assert lines[0] == "topology: 40 ranks in blocks of 20; a block reads 80 of the 160 samples of a step"
    words = [" ".join(line.split()) for line in lines]
    assert "vision 2 yes 2 2 10 tp r%2, pp r//2%2, dp r//4 none 4 of 4" in words
    assert "text 5 - 1 1 8 tp r%5, dp r//5 3 5 of 4" in words
    assert "scale 1 - 1 1 40 dp r - -" in words
    (first,) = [line for line in lines if line.startswith("vision  0-1 mod 4")]
    (last,) = [line for line in lines if line.startswith("vision  2-3 mod 4")]
    assert re.search(r"0-11, 24-35 +embeds +4,409,154,560 +8\.2 GiB +16\.4 GiB", first)
    assert re.search(r"12-23, 36-47 +projects ", last)
    assert re.search(r"text +all +0-31 +both ", "\n".join(lines))


def test_many_stages_and_chunks_stay_on_a_screen() -> None:
    lines = topology_lines(config(parallel={"vision": {"pp": 48}}), 48)
    assert len([line for line in lines if line.startswith("vision")]) == 1 + 3
    (middle,) = [line for line in lines if "1-46, 1 each" in line]
    assert middle.startswith("vision  1-46 "), "one copy of the tower: no `mod`"
    lines = topology_lines(config(parallel={"vision": {"pp": 12, "vpp": 4}}), 96)
    assert max(map(len, lines)) < 100
    assert any(re.search(r"vision +1-10 mod 12 +1-10, 1 each ", line) for line in lines)
    assert [line.strip() for line in lines].count("37-46, 1 each") == 1
    lines = topology_lines(config(parallel={"vision": {"pp": 2, "vpp": 24}}), 2)
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_holds_the_published_counts(precision: str) -> None:
    train = {"total_samples": 960, "global_batch_size": 96, "precision": precision}
    cfg = config("EVA02-CLIP-L-14", train=train)
    counts = count_parameters(cfg.model)
    width, state = (4, 8) if precision == "fp32" else (2, 12)
    for name, held in holdings(cfg, 1).items():
        (one,) = held
        if name == "scale":
            assert (one.parameters, one.weight_bytes, one.optimizer_bytes) == (1, 4, 8)
        else:
            assert one.parameters == counts[name]
            assert (one.weight_bytes, one.gradient_bytes) == (width * counts[name], 4 * counts[name])
            assert one.optimizer_bytes == state * counts[name]


def test_every_parameter_is_on_one_stage() -> None:
    whole = holdings(config(), 1)["vision"][0].parameters
    stages = holdings(config(parallel={"vision": {"pp": 5, "layers_per_stage": [8, 10, 10, 10, 10]}}), 5)["vision"]
    assert sum(one.parameters for one in stages) == whole
    assert [len(one.layers[0]) for one in stages] == [8, 10, 10, 10, 10]


def test_a_vocabulary_that_tp_does_not_divide_is_whole() -> None:
    one, five, four = (holdings(config(parallel={"text": {"tp": tp}}), 20)["text"][0].parameters for tp in (1, 5, 4))
    assert five > four
    blocks = one - 49408 * 1280
    assert 49408 * 1280 < five < 49408 * 1280 + blocks / 4


def test_a_frozen_scale_has_neither_gradient_nor_state() -> None:
    model = {**VARIANTS["EVA-CLIP-18B"], "logit_scale": {"trainable": False}}
    (scale,) = holdings(config(model=model), 1)["scale"]
    assert (scale.gradient_bytes, scale.optimizer_bytes) == (0, 0)


def test_a_frozen_tower_has_neither_and_an_average_is_state() -> None:
    cfg = config(optim={"vision": {"lr": 1e-3}, "frozen": ["vision"], "ema_decay": 0.999})
    (vision,), (text,) = (holdings(cfg, 1)[tower] for tower in ("vision", "text"))
    assert (vision.gradient_bytes, vision.optimizer_bytes) == (0, 0)
    assert vision.weight_bytes == 2 * 17_630_494_720
    assert text.optimizer_bytes == (4 + 8 + 4) * text.parameters


def test_a_teacher_is_counted_where_it_is(tmp_path: Path) -> None:
    cfg = config(
        task="mim",
        teacher={"checkpoint": str(tmp_path)},
        mim={"mask": {"num_masked": 105, "min_block": 16}},
        parallel={"vision": {"tp": 8}, "teacher": {"tp": 2}},
    )
    lines = topology_lines(cfg, 8)
    assert any(line.startswith("not counted: the teacher") for line in lines)
    assert any(line.startswith("teacher   2") for line in lines), "its place is known all the same"
    (tmp_path / INFO_NAME).write_text(
        json.dumps({"format": FORMAT, "model": VARIANTS["EVA02-CLIP-bigE-14-plus"]}), encoding="utf-8"
    )
    (teacher,) = holdings(cfg, 8)["teacher"]
    assert (teacher.gradient_bytes, teacher.optimizer_bytes) == (0, 0)
    assert 4_350_556_928 / 2 < teacher.parameters < 4_350_556_928 / 2 * 1.01
    assert not any("not counted: the teacher" in line for line in topology_lines(cfg, 8))
    broken = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"teacher": cfg.parallel.text})})
    assert holdings(broken, 8)["teacher"][0].parameters == 4_350_556_928
    axes = cfg.parallel.teacher.model_copy(update={"tp": 5})
    broken = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"teacher": axes})})
    with pytest.raises(ConfigError, match=r"parallel.teacher.tp=5 must divide the teacher's num_heads=16"):
        topology_lines(broken, 40)


def test_stages_that_only_wait_are_said() -> None:
    parallel = {"vision": {"pp": 2}}
    assert not any("wait" in line for line in topology_lines(config(parallel=parallel, batch=8, micro=4), 2))
    (line,) = [line for line in topology_lines(config(parallel=parallel, batch=8, micro=8), 2) if "wait" in line]
    assert line == "vision: its stages wait for each other in a step of one microbatch"
