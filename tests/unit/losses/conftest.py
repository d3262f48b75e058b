"""One process is a job of one rank."""

from collections.abc import Iterator

import pytest

from megaeva.config.schema import AxesSection
from megaeva.parallel import runtime
from megaeva.parallel.grid import Grid, build_grid


@pytest.fixture(scope="module")
def single_rank() -> Iterator[Grid]:
    yield build_grid(AxesSection(), runtime.start("cpu"))
    runtime.stop()
