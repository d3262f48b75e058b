"""Shares of a trace: each moment counts once; and traces of real steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megaeva.config import check_world, load
from megaeva.config.schema import ProfileSection
from megaeva.data.synthetic import make_shards
from megaeva.errors import ConfigError
from megaeva.observability.profile import PARTS, StepProfiler, read_trace, share_table, shares
from megaeva.parallel import runtime
from megaeva.trainer import Trainer
from tests.integration.test_training import write_recipe


def event(name: str, start_ms: float, ms: float, cat: str = "cpu_op") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": 1e3 * start_ms, "dur": 1e3 * ms}


def window(ms: float = 100) -> dict[str, Any]:
    return event("megaeva::window", 1000, ms, "user_annotation")


def test_each_moment_of_a_cpu_counts_once() -> None:
    events = [
        window(),
        event("aten::mm", 990, 15),  # begins before the window: 5 ms count
        event("megaeva::data", 1010, 10, "user_annotation"),
        event("aten::index", 1012, 5),  # by the decoder: data
        event("aten::linear", 1020, 30),
        event("aten::addmm", 1025, 20),  # inside linear, whose other 10 ms are copies and bookkeeping
        event("autograd::engine::evaluate_function: AddmmBackward0", 1050, 20),  # holds others only
        event("aten::mul", 1055, 5),
        event("gloo:all_reduce", 1056, 10),  # 4 ms behind the product
        event("aten::gelu", 1098, 10),  # 2 ms
        {"ph": "i", "name": "mark", "ts": 1},
    ]
    assert shares(events) == pytest.approx(
        {"matmul": 25, "memory-bound": 17, "communication": 6, "data": 10, "idle": 42}
    )


def test_a_gpu_is_judged_by_its_kernels() -> None:
    events = [
        window(),
        event("aten::mm", 1000, 90),  # the host's side
        event("sm90_xmma_gemm_bf16", 1010, 30, "kernel"),
        event("ncclDevKernel_AllReduce_Sum_bf16", 1030, 20, "kernel"),  # 10 ms hidden
        event("vectorized_elementwise_kernel", 1060, 10, "kernel"),
        event("Memcpy HtoD", 1070, 5, "gpu_memcpy"),
        event("megaeva::data", 1000, 20, "user_annotation"),  # 10 ms hidden
        event("megaeva::data", 1080, 20, "gpu_user_annotation"),
    ]
    assert shares(events) == pytest.approx(
        {"matmul": 30, "memory-bound": 15, "communication": 10, "data": 10, "idle": 35}
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::bmm", "matmul"),
        ("aten::mkldnn_convolution", "matmul"),
        ("megaeva::attention_backward", "matmul"),
        ("megaeva::infonce_forward", "matmul"),
        ("megaeva::swiglu", "memory-bound"),
        ("aten::_fused_adamw_", "memory-bound"),
        ("aten::sum", "memory-bound"),
        ("c10d::allreduce_", "communication"),
        ("Optimizer.step#AdamW.step", "idle"),
    ],
)
def test_operations_have_their_part(name: str, part: str) -> None:
    assert shares([window(), event(name, 1000, 100)])[part] == pytest.approx(100)


def test_a_trace_without_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="no range megaeva::window"):
        shares([event("aten::mm", 0, 1)])


def test_only_asked_ranks_and_steps_are_traced(tmp_path: Path) -> None:
    said: list[str] = []
    section = ProfileSection(first_step=1, num_steps=2)
    for rank in (0, 1):
        profiler = StepProfiler(section, tmp_path, rank, said.append)
        for step in range(4):
            profiler.at(step)
            torch.mm(torch.ones(8 + step, 8), torch.ones(8, 8))
        profiler.close()
    (path,) = (tmp_path / "profile").glob("*.json.gz")
    assert path.name == "rank_0_steps_1_2.json.gz"
    products = [e for e in read_trace(path) if e.get("name") == "aten::mm"]
    assert len(products) == 2
    table = (tmp_path / "profile" / "rank_0_steps_1_2.txt").read_text().splitlines()
    assert table == share_table(read_trace(path)) == said[1:]
    assert [line.split()[0] for line in table] == [*PARTS, "window"]


def test_a_run_traces_its_window(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=20, image_size=40, seed=0)
    recipe = write_recipe(tmp_path, str(tmp_path / "shards/*.tar"))
    length = ["train.total_samples=24", "train.profile.num_steps=2"]
    with pytest.raises(ConfigError, match=r"must end within the 3 steps of the run.*use 1 or less"):
        load(recipe, [*length, "train.profile.first_step=2"])
    with pytest.raises(ConfigError, match=r"train.profile.ranks=\[0, 2\] must be ranks of the run, 0 to 1"):
        check_world(load(recipe, [*length, "train.profile.first_step=1", "train.profile.ranks=[0,2]"]), 2)
    cfg = load(recipe, [*length, "train.profile.first_step=1"])
    Trainer(cfg, runtime.start("cpu"), resume=False, recipe_changes=[]).fit()
    events = read_trace(tmp_path / "run/profile/rank_0_steps_1_2.json.gz")
    milliseconds = shares(events)
    assert min(milliseconds["matmul"], milliseconds["memory-bound"], milliseconds["data"]) > 0
    (whole,) = (e["dur"] for e in events if e.get("name") == "megaeva::window")
    assert sum(milliseconds.values()) == pytest.approx(whole / 1e3)
