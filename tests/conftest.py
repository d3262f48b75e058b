"""What every test gets: one thread, and no GPU test without a GPU."""

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

# Before torch is imported anywhere, and inherited by every process a test starts: ranks with a thread pool each would
# spin against one another, and sums would depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def no_job_left() -> Iterator[None]:
    """Ends the torch.distributed job of this process that a module's tests began and left.

    Each of gloo's groups has three threads that wake a hundred times a second until the last reference is gone, and
    towers are cycles: there were 600 threads.
    """
    yield
    if "megaeva.parallel.runtime" in sys.modules:
        sys.modules["megaeva.parallel.runtime"].stop()
        if len(os.listdir("/proc/self/task")) > 30:
            gc.collect()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Any]:
    """This process as a job of one rank, a `megaeva.parallel.runtime.Runtime`."""
    import torch.distributed as dist

    from megaeva.parallel.runtime import start, stop

    started_here = not dist.is_initialized()
    yield start("cpu")
    if started_here:
        stop()
