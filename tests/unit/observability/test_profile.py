"""Shares of a trace: each moment counts once; and traces of real steps."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from megaeva.config import check_world, load
from megaeva.config.schema import ProfileSection
from megaeva.data.synthetic import make_shards
from megaeva.errors import ConfigError, DataError, explain_end
from megaeva.observability.profile import PARTS, StepProfiler, main, read_trace, share_table, shares
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
    with pytest.raises(DataError, match="no range megaeva::window"):
        shares([event("aten::mm", 0, 1)])


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", gzip.compress(b"[1, 2", mtime=0), gzip.compress(b"{}", mtime=0), b"\x1f\x8b\x08half"]
)
def test_a_file_that_is_no_trace_is_explained(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rank_0_steps_1_2.json.gz"
    if content is not None:
        path.write_bytes(content)
    assert explain_end(lambda: main([str(path)])) == 2
    assert explain_end(lambda: main([])) == 2
    told, usage = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {path} cannot be read as a trace")
    assert usage.startswith("error: no trace is given")


def traced(section: ProfileSection, run_dir: Path, rank: int, steps: range) -> StepProfiler:
    """A profiler after `steps`, each with one product."""
    profiler = StepProfiler(section, run_dir, rank)
    for step in steps:
        profiler.before_step(step)
        torch.mm(torch.ones(8 + step, 8), torch.ones(8, 8))
        profiler.after_step()
    return profiler


def products(path: Path) -> int:
    return sum(one.get("name") == "aten::mm" for one in read_trace(path))


def test_only_asked_ranks_and_steps_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1, 2):
        traced(ProfileSection(first_step=1, num_steps=2, ranks=(2, 1)), tmp_path, rank, range(4)).write()
    paths = sorted((tmp_path / "profile").glob("*.json.gz"))
    assert [path.name for path in paths] == ["rank_1_steps_1_2.json.gz", "rank_2_steps_1_2.json.gz"]
    assert [products(path) for path in paths] == [2, 2]
    table = (tmp_path / "profile" / "rank_1_steps_1_2.txt").read_text().splitlines()
    told, *printed = capsys.readouterr().out.splitlines()
    assert told == f"trace of steps 1 to 2: {paths[0]}"
    assert table == share_table(read_trace(paths[0])) == printed  # told by the first rank of those asked for, only
    assert [line.split()[0] for line in table] == [*PARTS, "window"]
    assert sum(float(line.split()[-2]) for line in table[:-1]) == pytest.approx(100, abs=0.03)
    assert main([str(paths[1])]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == share_table(read_trace(paths[1]))


def test_a_window_cut_short_is_written_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = ProfileSection(first_step=1, num_steps=5)
    stopped = traced(section, tmp_path, 0, range(3))
    stopped.before_step(3)  # its data are read, then the run is to stop
    stopped.end()
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # what it does before its end
    stopped.write()
    stopped.abandon()
    assert products(tmp_path / "profile" / "rank_0_steps_1_2.json.gz") == 2
    resumed = traced(section, tmp_path, 0, range(3, 5))  # at step 3, to its last step
    resumed.write()
    assert products(tmp_path / "profile" / "rank_0_steps_3_4.json.gz") == 2
    told = capsys.readouterr().out
    assert "no trace" not in told
    # An error in the window's second step; a stop before its first one is made.
    broken = traced(section, tmp_path, 0, range(1, 2))
    broken.before_step(2)
    broken.abandon()
    early = traced(section, tmp_path, 0, range(1))
    early.before_step(1)
    early.write()
    assert capsys.readouterr().out.splitlines() == [
        f"no trace: the run ended in step {step}, within train.profile's window" for step in (2, 1)
    ]
    assert len(list((tmp_path / "profile").iterdir())) == 4


def test_a_run_traces_its_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=20, image_size=40, seed=0)
    recipe = write_recipe(tmp_path, str(tmp_path / "shards/*.tar"))
    length = ["train.total_samples=24", "train.profile.num_steps=2"]
    with pytest.raises(ConfigError, match=r"must end within the 3 steps of the run.*use 1 or less"):
        load(recipe, [*length, "train.profile.first_step=2"])
    with pytest.raises(ConfigError, match=r"train.profile.ranks=\[0, 2\] must be ranks of the run, 0 to 1"):
        check_world(load(recipe, [*length, "train.profile.first_step=1", "train.profile.ranks=[0,2]"]), 2)
    with pytest.raises(ConfigError, match=r"train.profile.ranks=\[\] .*must name a rank"):
        load(recipe, [*length, "train.profile.first_step=1", "train.profile.ranks=[]"])
    cfg = load(recipe, [*length, "train.profile.first_step=1", "save.enabled=false"])
    Trainer(cfg, runtime.start("cpu"), resume=False, recipe_changes=[]).fit()
    events = read_trace(tmp_path / "run/profile/rank_0_steps_1_2.json.gz")
    milliseconds = shares(events)
    assert min(milliseconds["matmul"], milliseconds["memory-bound"], milliseconds["data"]) > 0
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
    assert "finished: step 3 is not saved (save.enabled=false)" in capsys.readouterr().out
    (whole,) = (e["dur"] for e in events if e.get("name") == "megaeva::window")
    assert sum(milliseconds.values()) == pytest.approx(whole / 1e3)
