"""What a sweep runs, what it reads from a run's folder, what it skips, and its tables. Jobs here are made up."""

import errno
import fcntl
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megaeva.bench import sweep
from megaeva.bench.sweep import Run, alone_in, fresh_rows, layout_overrides, make_runs, plan_runs, read_rows
from megaeva.bench.sweep_nodes import Machines
from megaeva.bench.sweep_tables import draw, scaling_of, strong_group, table_lines
from megaeva.config import load
from megaeva.errors import ConfigError
from megaeva.loop.launch import StageFailedError
from tests.integration.test_training import write_recipe

STEPS = 4
HERE = Machines(None)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, str(tmp_path / "*.tar"))


def planned(recipe: Path, said: list[str], **other: Any) -> list[Run]:
    options = {"ranks": [1, 2], "layouts": ["dp", "tp2"], "sizes": [], "precisions": [], "scaling": "both"} | other
    out = recipe.parent / "out"
    return plan_runs(recipe, ["seed=3"], steps=STEPS, machines=HERE, out=out, say=said.append, **options)


def test_layouts_are_words(recipe: Path) -> None:
    cfg = load(recipe)
    assert layout_overrides("dp", cfg) == []
    assert layout_overrides("tp4_text2_pp2_vpp3_mb8", cfg) == [
        "parallel.vision.tp=4", "parallel.text.tp=2", "parallel.vision.pp=2", "parallel.vision.vpp=3",
        "train.micro_batch_size=8",
    ]  # fmt: skip
    assert layout_overrides("tp2_sp_zero_recompute", cfg)[2:] == [
        "parallel.vision.sequence_parallel=true", "parallel.text.sequence_parallel=true",
        "parallel.distributed_optimizer=true", "parallel.vision.recompute=full", "parallel.text.recompute=full",
    ]  # fmt: skip
    # The recipe's own axes do not hide behind a layout's name.
    cut = load(recipe, ["parallel.vision.tp=2", "parallel.vision.sequence_parallel=true", "parallel.text.tp=2"])
    assert layout_overrides("dp", cut) == [
        "parallel.vision.tp=1", "parallel.vision.sequence_parallel=false", "parallel.text.tp=1",
    ]  # fmt: skip
    uneven = load(recipe, ["parallel.vision.pp=2", "parallel.vision.layers_per_stage=[1, 1]"])
    assert layout_overrides("tp2", uneven) == [
        "parallel.vision.pp=1", "parallel.vision.layers_per_stage=null", "parallel.vision.tp=2", "parallel.text.tp=2",
    ]  # fmt: skip
    for wrong in ("tp", "dp2", "cp2", "tp2-pp2", ""):
        with pytest.raises(ConfigError, match="is no layout; its words must be"):
            layout_overrides(wrong, cfg)


def test_a_sweep_plans_what_fits_and_says_what_does_not(recipe: Path) -> None:
    said: list[str] = []
    runs = planned(recipe, said)
    assert [(r.identity["layout"], r.ranks, r.cfg.train.global_batch_size) for r in runs] == [
        ("dp", 1, 8), ("dp", 2, 8), ("dp", 2, 16), ("tp2", 2, 8), ("tp2", 2, 16),
    ]  # fmt: skip
    assert len(said) == 1
    assert "left out: recipe_fp32_tp2_1_ranks_batch_8: 1 process must be a multiple of 2" in said[0]
    cfg = runs[2].cfg
    assert (cfg.seed, cfg.train.total_steps, cfg.train.log_every_steps) == (3, 9, 1)
    assert cfg.train.profile is not None
    assert (cfg.train.profile.first_step, cfg.train.profile.num_steps) == (7, 2)
    assert not cfg.save.enabled
    assert [r.cfg.train.global_batch_size for r in planned(recipe, said, scaling="strong", layouts=["dp"])] == [8, 8]
    assert [r.cfg.train.global_batch_size for r in planned(recipe, said, scaling="weak", layouts=["dp"])] == [8, 16]
    precise = planned(recipe, said, precisions=["fp32", "bf16"], layouts=["dp"], scaling="weak")
    assert [r.cfg.train.precision for r in precise] == ["fp32", "fp32", "bf16", "bf16"]
    with pytest.raises(ConfigError, match=r"^--sizes EVA-CLIP-88 must be a known variant; did you mean EVA-CLIP-8B"):
        planned(recipe, said, sizes=["EVA-CLIP-88"])
    with pytest.raises(ConfigError, match=r"^--precisions fp7 must be fp32, bf16, fp16, fp8; use some of them"):
        planned(recipe, said, precisions=["fp7"])
    with pytest.raises(ConfigError, match="no combination of --ranks 1 and --layouts tp2 fits"):
        planned(recipe, said, ranks=[1], layouts=["tp2"])


class Jobs(Machines):
    """Writes what a run of 2 s steps leaves; batch 16 fails."""

    made: list[str]
    gpu: str | None

    def __init__(self, gpu: str | None = None) -> None:
        super().__init__(None)
        vars(self).update(made=[], gpu=gpu)

    def start(self, recipe: Path, ranks: int, number: int, *, stage: str, again: str, patience_seconds: float) -> None:
        self.made.append(stage)
        assert patience_seconds == 600
        cfg = load(recipe)
        if cfg.train.global_batch_size == 16:
            raise StageFailedError(stage, 0, 1, "out of memory", recipe.parent / "train.log", again)
        run_dir = Path(cfg.run_dir)
        seconds = 2.0 / ranks**0.5
        lines = [
            {
                "step": step,
                # The first three steps and the traced ones are slow.
                "wall_time": 100.0 * min(step, 3) + seconds * max(0, min(step, 7) - 3) + 50.0 * max(0, step - 7),
                "samples_per_second": 8 / seconds,
                "data_wait_share": 0.25,
                "memory_gib": 1.0 + 0.1 * (step == 5) + 5 * (step == 9),
            }
            for step in range(1, 10)
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        events = [
            {"ph": "X", "cat": "user_annotation", "name": "megaeva::window", "ts": 0, "dur": 1000},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 300},
            {"ph": "X", "cat": "cpu_op", "name": "gloo:all_reduce", "ts": 300, "dur": 100},
        ]
        (run_dir / "profile").mkdir()
        with gzip.open(run_dir / "profile" / "rank_0_steps_7_8.json.gz", "wt") as file:
            json.dump({"traceEvents": events}, file)
        manifest = {
            "git_commit": "abc",
            "packages": {"torch": "2"},
            "machine": {"cores": 2, "gpu": self.gpu},
            "threads": "1",
        }
        (run_dir / "manifest.json").write_text(json.dumps(manifest))


def test_rows_are_measured_once(recipe: Path) -> None:
    jobs = Jobs()
    out, said = recipe.parent / "out", list[str]()
    runs = planned(recipe, said, layouts=["dp"])
    assert make_runs(runs, jobs, out, 0.001, said.append) == ["recipe_fp32_dp_2_ranks_batch_16"]
    one, two = read_rows(out)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["step_seconds"] == pytest.approx(2.0)
    assert one["samples_per_second"] == pytest.approx(4.0)
    assert one["mfu"] == pytest.approx(one["model_flops"] / 2.0 / 1e9)
    assert two["mfu"] == pytest.approx(one["mfu"] / 2**0.5)
    assert one["memory_gib"] == pytest.approx(1.1)
    assert one["data_wait_share"] == pytest.approx(0.25)
    assert one["communication_share"] == pytest.approx(0.1)
    assert (one["commit"], one["versions"], one["hardware"]["cores"]) == ("abc", {"torch": "2"}, 2)
    assert any("batch_16: failed, no row" in line and "out of memory" in line for line in said)

    # A kill cut the last line off; the same command makes that run and the failed one again, no other.
    lines = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(lines[:-20])
    jobs.made.clear()
    make_runs(runs, jobs, out, 0.001, said.append)
    assert jobs.made == ["recipe_fp32_dp_2_ranks_batch_8", "recipe_fp32_dp_2_ranks_batch_16"]
    assert [row["ranks"] for row in read_rows(out)] == [1, 2]


def test_a_row_of_another_recipe_is_made_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out, said = Jobs(), recipe.parent / "out", list[str]()
    monkeypatch.setattr(sweep, "git_commit", lambda: "abc")

    def swept() -> list[Run]:
        said.clear()
        jobs.made.clear()
        runs = planned(recipe, said, layouts=["dp"], scaling="strong")
        make_runs(runs, jobs, out, 0.001, said.append)
        return runs

    before = swept()
    assert swept()[0].digest == before[0].digest
    assert jobs.made == [] and said == [f"({i + 1}/2) {run.name}: has its row" for i, run in enumerate(before)]
    other = plan_runs(
        recipe, ["seed=3"], ranks=[1], layouts=["dp"], sizes=[], precisions=[], scaling="strong", steps=STEPS,
        machines=HERE, out=recipe.parent / "elsewhere", say=said.append,
    )  # fmt: skip
    assert other[0].digest == before[0].digest

    monkeypatch.setattr(sweep, "git_commit", lambda: "def")
    swept()
    assert jobs.made == [] and said[0].endswith(
        "has its row, of commit abc; this is def; delete the line in rows.jsonl to measure again"
    )

    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.002"))
    old = read_rows(out)
    runs = swept()
    assert jobs.made == [run.name for run in runs] == [run.name for run in before]
    assert all(f"{run.name}: its row is of another recipe, made again" in "\n".join(said) for run in runs)
    assert [row["digest"] for row in read_rows(out)] == [run.digest for run in runs]
    assert sorted(path.name for path in out.iterdir()) == ["rows.jsonl", "runs"]

    # A row that is left of the older recipe, or of a megaeva that wrote no digest, is in no table.
    mixed = [read_rows(out)[0], old[1]]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert fresh_rows(out, runs) == mixed[:1] and fresh_rows(out, runs[:1]) == mixed
    del mixed[0]["digest"]
    (out / "rows.jsonl").write_text(json.dumps(mixed[0]) + "\n")
    assert fresh_rows(out, runs) == []


def test_a_line_that_is_no_row_is_told(recipe: Path) -> None:
    out = recipe.parent / "out"
    make_runs(planned(recipe, [], layouts=["dp"], ranks=[1]), Jobs(), out, 0.001, print)
    kept = (out / "rows.jsonl").read_bytes()
    row = json.loads(kept)

    def other(**changes: object) -> bytes:
        return json.dumps(row | changes).encode()

    strays = [
        b"hello", b"[]", b'{"step": 1}', kept[:-20], b'{"recipe": "\xff"}', b"[" * 100_000,
        other(samples_per_second="fast"),
        other(samples_per_second=0.0), other(mfu=float("nan")), other(trace_shares={}), other(trace_shares=None),
        other(trace_shares=row["trace_shares"] | {"idle": "x"}), other(ranks=0), other(ranks=True), other(nodes="1"),
        other(overrides="seed=3"), other(commit=7), json.dumps({k: v for k, v in row.items() if k != "mfu"}).encode(),
    ]  # fmt: skip
    for stray in strays:
        (out / "rows.jsonl").write_bytes(kept + stray + b"\n")
        with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2 is no row of a sweep; .* remove that line"):
            read_rows(out)
    (out / "rows.jsonl").write_bytes(kept + strays[-1])  # a last line that is whole
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2 is no row of a sweep"):
        read_rows(out)
    for cut_off in (b"", b"\n", b"hello", kept[:-20], b'{"recipe": "\xc3'):
        (out / "rows.jsonl").write_bytes(kept + cut_off)
        assert read_rows(out) == [row]


def test_a_folder_is_one_sweeps(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        alone_in(out),
        pytest.raises(ConfigError, match=r"out is in use by another sweep; .* choose another"),
        alone_in(out),
    ):
        pass
    with alone_in(out):
        pass


def test_a_folder_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock_of_nfs(file: int, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise AssertionError("EBADF on NFS")

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with alone_in(tmp_path):
        pass

    def no_flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with alone_in(tmp_path):
        pass
    with pytest.raises(BlockingIOError), alone_in(tmp_path):  # of the sweep, not of the lock
        raise BlockingIOError
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"^--out .*file cannot be written \(Not a directory\); .*; choose another"),
        alone_in(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize(
    ("gpu", "precision", "peak", "source"),
    [
        (None, "fp32", 0.002, "torch.mm here, threads of a rank: 1"),
        ("NVIDIA H100 80GB HBM3 (compute capability 9.0)", "bf16", 989, "data sheet of h100-80"),
        ("NVIDIA A100-SXM4-40GB (compute capability 8.0)", "fp32", 19.5, "data sheet of a100-40"),
        ("NVIDIA H100 PCIe (compute capability 9.0)", "bf16", None, None),
    ],
)
def test_the_peak_is_measured_or_known_and_never_guessed(
    gpu: str | None, precision: str, peak: float, source: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_measured_ceiling", lambda precision, threads: 0.002)
    said: list[str] = []
    runs = planned(recipe, said, layouts=["dp"], ranks=[1], precisions=[precision])
    make_runs(runs, Jobs(gpu), recipe.parent / "out", None, said.append)
    (found,) = read_rows(recipe.parent / "out")
    assert (found["peak_tflops"], found["peak_from"]) == (peak, source)
    assert (found["mfu"] is None) == any("no MFU, the peak of NVIDIA H100 PCIe" in line for line in said)


def row(ranks: int, batch: int, rate: float) -> dict[str, Any]:
    shares = {"matmul": 0.4, "memory-bound": 0.3, "communication": 0.1, "data": 0.1, "idle": 0.1}
    return {
        "recipe": "r", "overrides": [], "size": "S", "precision": "bf16", "layout": "dp", "ranks": ranks,
        "global_batch_size": batch, "samples_per_second": rate, "mfu": 0.4, "memory_gib": 2.0, "data_wait_share": 0.01,
        "communication_share": 0.1, "trace_shares": shares,
    }  # fmt: skip


def test_tables_and_plot(tmp_path: Path) -> None:
    rows = [row(1, 8, 10.0), row(4, 8, 30.0), row(2, 8, 16.0), row(2, 16, 19.0)]
    lines = table_lines(rows)
    assert "| S | bf16 | dp | 1 | 8 | 10 | 40.0 % | 2.00 | 1.0 % | 10.0 % |" in lines
    strong, weak = lines.index("Strong scaling"), lines.index("Weak scaling")
    assert [line.split(" | ")[4:] for line in lines[strong + 4 : weak - 1]] == [
        ["1", "10", "1.00", "100 % |"], ["2", "16", "1.60", "80 % |"], ["4", "30", "3.00", "75 % |"],
    ]  # fmt: skip
    assert lines[-1] == "| S | bf16 | dp | 16 | 2 | 19 | 1.90 | 95 % |"
    assert {strong_group(one) for one in rows[:3]} == {strong_group(rows[0])}
    assert not any("scaling" in line for line in table_lines(rows[:1]))
    assert scaling_of(rows[:1])[0][1:] == (1.0, 1.0)
    draw(rows, tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").stat().st_size > 5000
