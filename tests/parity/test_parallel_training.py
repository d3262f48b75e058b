"""The beginning of a run on any layout: losses and parameters are the single process's. `make parity` trains longer."""

from typing import Any

import pytest

from tests.helpers.layouts import LAYOUTS, Layout
from tests.helpers.parallel_runs import TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_training_equals_single_process(results: Any, layout: Layout, task: str) -> None:
    for case, found in results("training", layout, task):
        assert not found.beyond_bounds(), (case.variant, found)
