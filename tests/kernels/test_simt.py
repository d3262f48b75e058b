"""The emulator that runs CUDA source in tests: what is right passes under every schedule, and each mistake is named."""

import re

import pytest
import torch
from torch import Tensor

from tests.kernels.simt_build import KernelFault, Kernels, compile_kernels

pytestmark = pytest.mark.slow
MANY_SEEDS = range(20)
NUM_THREADS = 96  # of a block, in simt_cases.cpp


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_kernels("simt_cases.cpp", tmp_path_factory.mktemp("simt"))


def _line() -> Tensor:
    return torch.full((NUM_THREADS,), torch.nan)


# --------------------------------------------------------------------------------------------------------------- right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_block_reduction(cases: Kernels, dtype: torch.dtype) -> None:
    x = torch.arange(5 * 333, dtype=dtype).reshape(5, 333)
    for seed in MANY_SEEDS:
        sums = torch.full((5,), torch.nan, dtype=dtype)
        cases.call("run_sum_double" if dtype == torch.float64 else "run_sum_float", x, sums, 5, 333, seed=seed)
        assert torch.equal(sums, x.sum(1))


def test_tiled_transpose(cases: Kernels) -> None:
    x = torch.arange(70.0 * 45).reshape(70, 45)
    for seed in MANY_SEEDS:
        y = torch.full((45, 70), torch.nan)
        cases.call("run_transpose", x, y, 70, 45, seed=seed)
        assert torch.equal(y, x.T)


def test_dynamic_shared_memory(cases: Kernels) -> None:
    x = torch.arange(200.0, dtype=torch.float64)
    for seed in MANY_SEEDS:
        y = torch.zeros(200, dtype=torch.float64)
        cases.call("run_reverse", x, y, 200, 200 * 8, seed=seed)
        assert torch.equal(y, x.flip(0))
        with pytest.raises(KernelFault, match=r"touches all\[199\] of reverse; it has 199 elements"):
            cases.call("run_reverse", x, y, 200, 199 * 8, seed=seed)


@pytest.mark.parametrize("name", ["float", "double", "int", "int64"])
def test_shuffles(cases: Kernels, name: str) -> None:
    dtype = getattr(torch, {"int": "int32"}.get(name, name))
    x = (
        torch.arange(32).mul(2**40 + 3 if name in ("int64", "double") else 3).to(dtype)
    )  # beyond 32 bits where it can be
    sources = [
        [
            lane * 3 % 32,
            lane ^ 5,
            lane + 3 if lane + 3 < 32 else lane,
            lane - 3 if lane >= 3 else lane,
            lane + 3 if lane % 8 + 3 < 8 else lane,
            lane - 3 if lane % 8 >= 3 else lane,
            lane // 8 * 8 + 1,
            lane ^ 1 if lane < 8 else lane ^ 2,
        ]
        for lane in range(32)
    ]
    for seed in MANY_SEEDS:
        out = torch.zeros(32, 8, dtype=dtype)
        cases.call(f"run_exchange_{name}", x, out, seed=seed)
        assert torch.equal(out, x[torch.tensor(sources)])


def test_votes(cases: Kernels) -> None:
    out = torch.zeros(32, dtype=torch.int64)
    cases.call("run_vote", out, seed=3)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    assert out.tolist() == [ballot * 4 + 2 + 0] * 32


def test_a_barrier_of_the_warp_orders_its_shared_memory(cases: Kernels) -> None:
    for seed in MANY_SEEDS:
        line = _line()
        cases.call("run_neighbours", line, 1, seed=seed)
        assert torch.equal(line, (torch.arange(NUM_THREADS) ^ 1).float())
        with pytest.raises(KernelFault, match=r"no barrier between|no thread of this block"):
            cases.call("run_neighbours", line, 0, seed=seed)


def test_threads_that_returned_do_not_hold_up_a_barrier(cases: Kernels) -> None:
    for seed in MANY_SEEDS:
        line = _line()
        cases.call("run_early_return", line, 50, seed=seed)
        assert torch.equal(line[:50], torch.arange(49.0, -1, -1))
        assert line[50:].isnan().all()


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("missing_barrier", "y", r"line\[\d+\] of missing_barrier, which (thread .* wrote with no barrier|no thread)"),
        ("missing_second_barrier", "y", r"line\[\d+\] of missing_second_barrier, which .* with no barrier between"),
        ("write_after_read", ["y", 3, 40], r"line\[0\] of write_after_read, which .* with no barrier between"),
        ("two_writers", "", r"writes flag\[0\] of two_writers, which thread .* wrote with no barrier between"),
        ("shared_index", [1], r"thread \(95, 0, 0\): touches line\[96\] of shared_index; it has 96 elements"),
        ("shared_index", [-1], r"thread \(0, 0, 0\): touches line\[-1\] of shared_index"),
        ("unwritten_read", "y", r"thread \(40, 0, 0\): reads line\[40\] .* no thread of this block has written"),
        ("shuffle_with_exited_lane", "y", r"__shfl_xor_sync in line \d+ with mask 0xffffffff for lane 5, which has"),
        ("shuffle_in_a_branch", "y", r"threads 0-15 wait at __shfl_xor_sync.*; threads 16-31 wait at __syncthreads"),
        ("shuffle_from_outside_the_mask", "y", r"calls __shfl_sync for lane 20, which its mask leaves out"),
        ("shuffle_without_itself", "y", r"with mask 0xffff, which leaves its own lane out"),
        ("barrier_in_a_branch", "", r"no thread can go on; threads 0-39 wait at __sync.*; threads 40-95 wait"),
        ("local_array", ["y", 4], r"index outside a local array"),
        ("divide", ["y", 0], r"divides an integer by zero"),
        ("deep_stack", "y", r"outgrew its stack"),
        ("twice", "y", r"touches line\[\d+\] of shared_index"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(cases: Kernels, name: str, arguments: list | str, expected: str) -> None:
    line = _line()
    converted = [line if argument == "y" else argument for argument in arguments]
    for seed in MANY_SEEDS:
        faults = []
        for _ in range(2):
            with pytest.raises(KernelFault, match=expected) as fault:
                cases.call(f"run_{name}", *converted, seed=seed)
            faults.append(re.sub("0x.*", "", str(fault.value)))
        assert re.match(r"block \(0, 0, 0\)(, thread \(\d+, 0, 0\))?: ", faults[0])
        assert faults[0] == faults[1]  # a seed is a run
        assert line.isnan().all()  # nothing comes back from a launch that failed


@pytest.mark.parametrize(
    ("first", "second", "readers"),
    [
        (3, 40, r"thread \(3, 0, 0\)"),
        (3, 70, r"thread \(3, 0, 0\)"),
        (40, 41, "other threads"),
        (70, 71, "other threads"),
    ],
)
def test_a_write_after_a_read_in_order_is_still_a_race(cases: Kernels, first: int, second: int, readers: str) -> None:
    expected = rf"thread \({second}, 0, 0\): writes line\[0\] of write_after_read, which {readers} read with no barrier"
    with pytest.raises(KernelFault, match=expected):
        cases.call("run_write_after_read", _line(), first, second, seed=0)
    for seed in MANY_SEEDS:
        cases.call("run_write_after_read", _line(), second, second, seed=seed)  # its own read is no race


def test_a_drawn_schedule_shows_what_threads_in_order_hide(cases: Kernels) -> None:
    expected = (torch.arange(NUM_THREADS) - 1).clamp_min(0).float()
    right = []
    for seed in MANY_SEEDS:
        line = _line()
        cases.call("run_missing_barrier_in_global_memory", _line(), line, seed=seed)
        right.append(torch.equal(line, expected))
    assert right[0]
    assert not any(right[1:])


def test_memory_outside_the_tensors(cases: Kernels) -> None:
    x, y = torch.arange(64.0), torch.zeros(1)
    cases.call("run_global_read", x, y, 63, seed=0)
    assert y == 63
    with pytest.raises(KernelFault, match=r"touches global memory that belongs to no tensor, at 0x"):
        cases.call("run_global_read", x, y, 64, seed=0)
    with pytest.raises(KernelFault, match="touches global memory that belongs to no tensor, at "):
        cases.call("run_global_read", None, y, 0, seed=0)
    cases.call("run_global_read", x, y, -1, seed=0)
    assert y.isnan()  # before a tensor: no page, but a value that shows
    with pytest.raises(KernelFault, match="wrote outside tensor 0"):
        cases.call("run_global_write", x, -1, seed=0)
    rows = torch.zeros(4, 20)[:, :16]
    with pytest.raises(KernelFault, match="wrote outside tensor 0"):
        cases.call("run_global_write", rows, 18, seed=0)  # between two rows
    odd = torch.zeros(3)
    with pytest.raises(KernelFault, match="wrote outside tensor 0"):
        cases.call("run_global_write", odd, 3, seed=0)  # in the 4 bytes that keep its first element aligned


def test_vectors_must_be_aligned(cases: Kernels) -> None:
    x, y = torch.arange(64.0), torch.zeros(1)
    cases.call("run_vector_read", x, y, 4, seed=0)
    assert y == 7
    with pytest.raises(KernelFault, match="misaligned"):
        cases.call("run_vector_read", x, y, 1, seed=0)
    with pytest.raises(KernelFault, match="misaligned"):
        cases.call("run_vector_read", x[1:], y, 0, seed=0)  # the copy is as misaligned as the tensor


@pytest.mark.parametrize("launch", [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 48 * 1024 + 1)])
def test_a_launch_that_a_gpu_refuses(cases: Kernels, launch: tuple[int, int, int]) -> None:
    with pytest.raises(KernelFault, match="no such launch on a GPU"):
        cases.call("run_grid", *launch, seed=0)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("const float x = tile[0]; y[0] = x + tile[1] * 2;", None),
        ("auto x = tile[0]; y[0] = x;", "discards qualifiers|cannot convert"),  # would read at the second semicolon
        ("__shared__ float raw[4]; y[0] = raw[0];", "declare shared memory with MEGAEVA_SHARED"),
    ],
)
def test_what_would_escape_the_checks_does_not_compile(
    tmp_path_factory: pytest.TempPathFactory, statement: str, expected: str | None
) -> None:
    folder = tmp_path_factory.mktemp("simt")
    source = folder / "case.cpp"
    source.write_text(
        '#include "common/kernel.h"\n'
        f"__global__ void kernel(float* y) {{ MEGAEVA_SHARED(float, tile, 4); {statement} }}\n"
        'extern "C" int run(float* y) { return megaeva::launch(kernel, 1, 32, 0, nullptr, y); }\n'
    )
    if expected is None:
        compile_kernels(str(source), folder)
    else:
        with pytest.raises(AssertionError, match=expected):
            compile_kernels(str(source), folder)
