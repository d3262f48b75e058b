"""Loss and all gradients of a step on any layout equal the single process's; in bf16, its error does."""

from typing import Any

import pytest

from tests.helpers.layouts import LAYOUTS, Layout
from tests.helpers.parallel_runs import TASKS
from tests.helpers.run_differences import BF16_ERROR

_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
_tasks = pytest.mark.parametrize("task", TASKS)


@_tasks
@_layouts
def test_step_equals_single_process(results: Any, layout: Layout, task: str) -> None:
    for case, found in results("step", layout, task):
        assert found.gradient is not None
        assert not found.beyond_bounds(), (case.variant, found)


@_tasks
@_layouts
def test_bf16_error_is_that_of_one_process(results: Any, layout: Layout, task: str) -> None:
    """The distance of the whole gradient from the fp32 gradient of the same weights."""
    for case, found in results("bf16", layout, task):
        assert found.error_ratio is not None
        assert found.error_ratio <= BF16_ERROR, (case.variant, found)
