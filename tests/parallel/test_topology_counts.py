"""What `megaeva train --topology` prints is what the ranks of a real grid hold: layers, parameters and bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megaeva.checkpoint.layout import FORMAT, INFO_NAME
from megaeva.config.schema import AxesSection, Config
from megaeva.model import MIMStudent, VisionTower, build_clip
from megaeva.optim.build import build_optimizer
from megaeva.optim.tower_optimizer import TowerOptimizers, main_state
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.wrap import Tower, wrap
from megaeva.planning.topology import Holding, holdings
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import tiny

RANKS = 4
Axes = Mapping[str, Any]
LAYOUTS: dict[str, tuple[str, Axes]] = {
    "tp": ("fp32", {"vision": {"tp": 4}, "text": {"tp": 2}}),
    "dp": ("bf16", {}),
    "tp dp": ("bf16", {"vision": {"tp": 2, "sequence_parallel": True}}),
    "tp pp": ("bf16", {"vision": {"tp": 2, "pp": 2}, "text": {"tp": 2}}),
    "uneven pp": ("fp32", {"vision": {"pp": 4, "layers_per_stage": [1, 2, 1, 1]}}),
    "vpp": ("fp32", {"vision": {"pp": 2, "vpp": 2}, "text": {"tp": 2}, "distributed_optimizer": False}),
    "vocabulary": ("bf16", {"text": {"tp": 4}}),
}


def clip(precision: str, axes: Axes) -> Config:
    model = tiny("EVA02-CLIP-L-14", num_layers=5)
    text = model.text.model_copy(update={"vocab_size": 62, "num_heads": 4})  # 62 is not a multiple of 4
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "unused",
            "model": model.model_copy(update={"text": text}).model_dump(),
            "parallel": axes,
            "optim": {"vision": {"lr": 1e-3}},
            "train": {"total_samples": 96, "global_batch_size": 96, "precision": precision},
        }
    )


def towers_of(cfg: Config, runtime: Runtime) -> list[Tower]:
    if cfg.task == "mim":
        student_grid = build_grid(cfg.parallel.vision, runtime)
        student = MIMStudent(cfg.model.vision, 20, grid=student_grid, precision=cfg.train.precision)
        teacher_grid = build_grid(cfg.parallel.teacher, runtime)
        teacher = VisionTower(cfg.model.vision, 20, grid=teacher_grid, precision=cfg.train.precision)
        return [
            wrap("student", student, student_grid, cfg.parallel),
            Tower("teacher", teacher.requires_grad_(False), teacher, teacher_grid),
        ]
    grids = [build_grid(axes, runtime) for axes in (cfg.parallel.vision, cfg.parallel.text, AxesSection())]
    model = build_clip(cfg.model, vision_grid=grids[0], text_grid=grids[1], precision=cfg.train.precision)
    modules = {"vision": model.vision, "text": model.text, "scale": model.scale}
    return [wrap(name, module, grid, cfg.parallel) for (name, module), grid in zip(modules.items(), grids, strict=True)]


def measured(runtime: Runtime, cfgs: dict[str, Config]) -> dict[str, dict[str, dict[str, Any]]]:
    """By layout and tower: what this rank's modules, gradient buffers and optimizer really hold."""
    result = {}
    for case, cfg in cfgs.items():
        towers = towers_of(cfg, runtime)
        optimizer, _ = build_optimizer([tower for tower in towers if tower.trained], cfg)
        result[case] = {tower.name: _measure(tower, optimizer) for tower in towers}
    return result


def _measure(tower: Tower, optimizer: TowerOptimizers) -> dict[str, Any]:
    parameters = dict(tower.module.named_parameters())
    state = 0
    if tower.trained:
        for parameter in parameters.values():
            try:
                held = main_state(optimizer.optimizers[tower.name], parameter)
            except KeyError:
                continue  # another data rank's share
            # An fp32 parameter is its own main copy.
            state += sum(held[key].nbytes for key in held if key != "param" or parameter.element_size() < 4)
    names = [name.partition("blocks.layers.")[2].partition(".")[0] for name in parameters if "blocks.layers." in name]
    return {
        "stage": tower.grid.pp_rank,
        "copy": (tower.grid.tp_rank, tower.grid.pp_rank),
        "layers": sorted({int(name) for name in names}),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "weights": sum(parameter.nbytes for parameter in parameters.values()),
        "gradients": sum(p.main_grad.nbytes for p in parameters.values()) if tower.trained else 0,
        "optimizer": state,
        "padded": max(buffer.numel for buffer in tower.ddp.buffers) if tower.trained else 0,
        "dp": tower.grid.dp_size,
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Config], list[Any]]:
    """Every layout on four ranks, in one start of four processes."""
    cfgs = {name: clip(*layout) for name, layout in LAYOUTS.items()}
    teacher = tmp_path_factory.mktemp("teacher")
    clip_section = cfgs["tp"].model.model_dump()
    (teacher / INFO_NAME).write_text(json.dumps({"format": FORMAT, "model": clip_section}), encoding="utf-8")
    student = {
        "task": "mim",
        "teacher": {"checkpoint": str(teacher)},
        "mim": {"mask": {"num_masked": 4, "min_block": 1}},
        "parallel": {"vision": {"tp": 2, "pp": 2}, "teacher": {"tp": 2}},
    }
    cfgs["mim"] = Config.model_validate(cfgs["tp"].model_dump() | student)
    return cfgs, run_ranks(measured, RANKS, cfgs)


@pytest.mark.parametrize("case", [*LAYOUTS, "mim"])
def test_the_table_is_what_the_ranks_hold(case: str, cases: tuple[dict[str, Config], list[Any]]) -> None:
    cfgs, ranks = cases
    cfg = cfgs[case]
    table = holdings(cfg, RANKS)
    whole = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"distributed_optimizer": False})})
    unshared = holdings(whole, RANKS)
    for name, stages in table.items():
        for rank in ranks:
            real = rank[case][name]
            told: Holding = stages[real["stage"]]
            assert [layer for part in told.layers for layer in part] == real["layers"], name
            assert told.parameters == real["parameters"], name
            assert told.weight_bytes == real["weights"], name
            assert told.gradient_bytes == real["gradients"], name
            # Pieces of the padded buffer are of equal length: a rank holds at most one, and all together the whole.
            together = sum(
                other[case][name]["optimizer"] for other in ranks if other[case][name]["copy"] == real["copy"]
            )
            copies = 1 if cfg.parallel.distributed_optimizer else real["dp"]
            assert together == copies * unshared[name][real["stage"]].optimizer_bytes, name
            bytes_each = 12 if name != "scale" and cfg.train.precision == "bf16" else 8
            piece = real["padded"] // real["dp"] if cfg.parallel.distributed_optimizer else real["padded"]
            assert real["optimizer"] <= piece * bytes_each, name
            padding = bytes_each * max(0, real["padded"] - real["parameters"])
            assert abs(told.optimizer_bytes - real["optimizer"]) <= padding + bytes_each, name


def test_the_layouts_are_what_they_are_named_for(cases: tuple[dict[str, Config], list[Path]]) -> None:
    cfgs, _ = cases
    assert cfgs["vocabulary"].model.text.vocab_size % cfgs["vocabulary"].parallel.text.tp
    assert len(holdings(cfgs["vpp"], RANKS)["vision"][0].layers) == 2
