"""One process is a job of one rank."""

import pytest

from megaeva.config.schema import AxesSection
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.runtime import Runtime


@pytest.fixture(scope="module")
def single_rank(runtime: Runtime) -> Grid:
    return build_grid(AxesSection(), runtime)
