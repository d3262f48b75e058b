"""The guard's rules, without a model."""

import json
from typing import Any

import pytest

from megaeva.config.schema import MAX_LOSS_SCALE, Fp16Section, SpikeGuardSection
from megaeva.optim.guard import StepGuard
from megaeva.optim.loss_scale import LossScale
from megaeva.parallel.runtime import Runtime

QUIET = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.1, 1.1)]
"""Loss and gradient norm of steps 0 to 3; medians 2.05 and 1.05."""


def guard(**section: Any) -> StepGuard:
    made = StepGuard(SpikeGuardSection(**{"window": 4} | section))
    for step, (loss, norm) in enumerate(QUIET):
        assert made.judge(step, loss, norm).action == "update"
    return made


@pytest.mark.parametrize(
    ("loss", "norm", "action"),
    [
        (4.0, 10.4, "update"),
        (4.2, 1.0, "skip"),
        (2.0, 10.6, "skip"),
        (float("nan"), 1.0, "skip"),
        (2.0, float("inf"), "skip"),
    ],
)
def test_a_spike_stands_out_of_the_medians(loss: float, norm: float, action: str) -> None:
    assert guard().judge(4, loss, norm).action == action


def test_a_spike_is_no_measure_of_later_ones() -> None:
    watched = guard()
    for step in range(4, 10):
        verdict = watched.judge(step, 100.0, 1.0)
        assert verdict.action == "skip"
        assert "loss=100 " in verdict.fault and "2.05" in verdict.fault
    assert watched.num_skipped == 6


def test_negative_losses() -> None:
    """Of distillation, a negative cosine: twice the median would be below it."""
    watched = StepGuard(SpikeGuardSection(window=2))
    for step in range(2):
        assert watched.judge(step, -0.5, 1.0).action == "update"
    assert watched.judge(2, -0.4, 1.0).action == "update"
    assert watched.judge(3, 0.1, 1.0).action == "skip"


def test_nothing_is_judged_before_the_window_is_full_but_what_is_not_finite() -> None:
    watched = StepGuard(SpikeGuardSection(window=3))
    assert watched.judge(0, 1.0, 1.0).action == "update"
    assert watched.judge(1, 1e6, 1e6).action == "update"
    assert watched.judge(2, float("nan"), 1.0).action == "stop"
    assert StepGuard(None).judge(0, 1.0, float("nan")).action == "stop"


def test_a_ratio_of_none_judges_nothing() -> None:
    assert guard(loss_ratio=None).judge(4, 1e9, 1.0).action == "update"
    assert guard(grad_norm_ratio=None).judge(4, 2.0, 1e9).action == "update"
    assert guard(loss_ratio=None).judge(4, float("nan"), 1.0).action == "skip"


def test_spikes_in_a_row_stop_the_run_and_a_quiet_window_forgets_them() -> None:
    watched = guard(max_spikes=3)
    actions = [watched.judge(step, 1e3, 1.0).action for step in (4, 6)]
    assert actions == ["skip", "skip"]
    assert watched.judge(11, 1e3, 1.0).action == "skip", "the first of a new row: steps 7 to 10 were quiet"
    assert watched.judge(12, 1e3, 1.0).action == "skip"
    verdict = watched.judge(16, 1e3, 1.0)
    assert verdict.action == "stop"
    assert "max_spikes=3" in verdict.fault


def test_steps_that_a_roll_back_repeats_are_no_quiet_window() -> None:
    """The run would go round in circles: the same spike, hundreds of quiet steps, the same spike."""
    watched = guard(action="roll_back", max_spikes=3)
    saved = watched.state_dict()
    for attempt in range(3):
        watched.go_back(saved)
        for step in range(4, 40):
            assert watched.judge(step, 2.0, 1.0).action == "update"
        assert watched.judge(40, 1e3, 1.0).action == ("stop" if attempt == 2 else "roll_back")


def test_each_phase_of_the_data_has_its_own_median() -> None:
    """Videos after images may have twice the loss; and a run that goes back stays in the phase of its data."""
    watched = StepGuard(SpikeGuardSection(window=2, action="roll_back"))
    for step in range(2):
        assert watched.judge(step, 1.0, 1.0, "data.phases.0").action == "update"
    saved = json.loads(json.dumps(watched.state_dict()))
    for step in (2, 3):
        assert watched.judge(step, 3.0, 1.0, "data.phases.1").action == "update"
    assert watched.judge(4, 7.0, 1.0, "data.phases.1").action == "roll_back"
    watched.go_back(saved)
    assert watched.judge(2, 3.0, 1.0, "data.phases.1").action == "update"
    resumed = StepGuard(SpikeGuardSection(window=2))
    resumed.load_state_dict(saved)
    assert resumed.judge(2, 3.0, 1.0, "data.phases.0").action == "skip"


def test_it_continues_from_json() -> None:
    first = guard()
    first.judge(4, 1e3, 1.0)
    second = StepGuard(SpikeGuardSection(window=4))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    for step, loss in ((5, 2.0), (6, 1e3)):
        assert second.judge(step, loss, 1.0) == first.judge(step, loss, 1.0)


def test_an_overflow_is_no_spike_and_ends_the_run_at_the_smallest_scale(runtime: Runtime) -> None:
    scale = LossScale(Fp16Section(initial_scale=4.0, min_scale=2.0, growth_interval=2))
    watched = StepGuard(None, scale)

    def step(number: int, norm: float) -> str:
        scale.settle(norm == float("inf"))
        return watched.judge(number, 1.0, norm).action

    assert [step(0, 1.0), step(1, 1.0)] == ["update"] * 2
    assert scale.value == 8.0, "doubled after two"
    assert [step(2, float("inf")), step(3, float("inf"))] == ["rescale"] * 2
    assert scale.value == 2.0
    resumed = LossScale(Fp16Section())
    StepGuard(None, resumed).load_state_dict(json.loads(json.dumps(watched.state_dict())))
    assert (resumed.value, resumed.overflowed) == (2.0, False)
    assert watched.figures() == {"skipped_steps": 2, "loss_scale": 4.0}
    assert step(4, float("inf")) == "stop"


@pytest.mark.parametrize("min_scale", [0.1, 0.3])
def test_the_smallest_scale_is_known_again_when_fp32_rounds_it(runtime: Runtime, min_scale: float) -> None:
    """fp32 rounds 0.1 up: a scale of it is above 0.1, and the run would go on without an update for ever."""
    scale = LossScale(Fp16Section(initial_scale=1.0, min_scale=min_scale))
    watched = StepGuard(None, scale)
    actions = []
    for step in range(6):
        scale.settle(True)
        actions.append(watched.judge(step, 1.0, float("inf")).action)
    assert actions[-1] == "stop"


def test_the_scale_does_not_grow_beyond_what_fp32_holds(runtime: Runtime) -> None:
    """From infinity no halving leads back."""
    scale = LossScale(Fp16Section(growth_interval=1))
    for _ in range(200):
        scale.settle(False)
    largest = scale.value
    scale.settle(True)
    assert scale.value == largest / 2 == MAX_LOSS_SCALE / 2


def test_a_smaller_growth_interval_counts_in_a_resumed_run(runtime: Runtime) -> None:
    """mcore doubles where the count equals the interval; beyond it the scale would stay until an overflow."""
    before, resumed = LossScale(Fp16Section(growth_interval=100)), LossScale(Fp16Section(growth_interval=5))
    for _ in range(50):
        before.settle(False)
    resumed.load_state_dict(before.state_dict())
    resumed.settle(False)
    assert resumed.value == 2 * before.value
