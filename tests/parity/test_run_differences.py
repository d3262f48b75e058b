"""The measure that the parity tests and `make parity` judge by sees what it must."""

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.layouts import LAYOUTS
from tests.helpers.parallel_runs import Run
from tests.helpers.run_differences import BOUND, difference


def _run() -> Run:
    tensors = {name: torch.full((4,), value) for name, value in {"large": 1e3, "small": 1e-3}.items()}
    return Run(fresh=tensors, losses=[2.0, -1.0], norms=[3.0, 1.0], gradients=tensors, first=tensors, last=tensors)


def test_the_same_run_is_within_bounds() -> None:
    assert difference(_run(), _run(), _run()).beyond_bounds() == []


@pytest.mark.parametrize("off", [10 * BOUND, math.nan])
@pytest.mark.parametrize("field", ["fresh", "gradients", "first", "last"])
def test_a_tensor_that_is_off_is_named_however_small(field: str, off: float) -> None:
    tensors = getattr(_run(), field)
    run = replace(_run(), **{field: tensors | {"small": tensors["small"] * (1 + off)}})
    (words,) = difference(run, _run(), _run()).beyond_bounds()
    assert "small" in words


@pytest.mark.parametrize("off", [10 * BOUND, math.nan])
def test_a_loss_that_is_off_is_seen(off: float) -> None:
    assert len(difference(replace(_run(), losses=[2.0, -1.0 - off]), _run(), _run()).beyond_bounds()) == 1
    assert len(difference(replace(_run(), norms=[3.0 * (1 + off), 1.0]), _run(), _run()).beyond_bounds()) == 1


def test_a_missing_tensor_is_an_error() -> None:
    run = replace(_run(), last={"large": torch.ones(4)})
    with pytest.raises(AssertionError, match="small"):
        difference(run, _run(), _run())


def test_error_in_units_of_the_single_process() -> None:
    exact = _run()
    single, run = (
        replace(exact, gradients=exact.gradients | {"small": exact.gradients["small"] + error}) for error in (1.0, 3.0)
    )
    assert difference(run, single, exact).error_ratio == pytest.approx(3.0)
    assert difference(run, exact, exact).error_ratio is None


def test_layouts_have_names_of_their_own_and_cover_the_axes() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    vision = [layout.vision for layout in LAYOUTS]
    assert any(axes.tp > 1 and axes.sequence_parallel and axes.pp > 1 for axes in vision)
    assert any(axes.vpp > 1 for axes in vision) and any(axes.layers_per_stage for axes in vision)
    assert {axes.recompute for axes in vision} >= {"none", "selective", "full", 2}
    assert {layout.num_blocks for layout in LAYOUTS} >= {1, 2, 4}
