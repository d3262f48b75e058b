"""Towers that are not trained: no gradient, no buffer, no optimizer, and the others' gradients are what they were.

That a run with one equals the single process on every kind of layout is in tests/parity/test_parallel_training.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megaeva.errors import ParameterRuleError
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks.contrastive import Contrastive
from tests.helpers.layouts import Layout
from tests.helpers.parallel_runs import Case, make_recipe, run_case, whole_batch

# Without drop path, which a frozen tower does not have.
CASE = Case(Layout("two passes", microbatches=2, drop_path=0.0), "contrastive", "EVA02-CLIP-L-14")


def test_the_other_tower_has_the_gradients_it_had(runtime: Runtime) -> None:
    trained, locked = run_case(runtime, CASE), run_case(runtime, replace(CASE, frozen=("vision",)))
    assert locked.losses == trained.losses
    others = {name: gradient for name, gradient in trained.gradients.items() if not name.startswith("vision.")}
    assert locked.gradients.keys() == others.keys() and others
    assert all(torch.equal(locked.gradients[name], gradient) for name, gradient in others.items())
    vision = [name for name in trained.first if name.startswith("vision.")]
    assert all(not torch.equal(locked.first[name], trained.first[name]) for name in vision)


def test_a_frozen_tower_costs_no_memory_beside_its_weights(runtime: Runtime) -> None:
    task = Contrastive(make_recipe(replace(CASE, frozen=("vision",))), runtime)
    assert [tower.trained for tower in task.towers] == [False, True, True]
    assert not any(hasattr(parameter, "main_grad") for parameter in task.model.vision.parameters())
    optimizer, rate = build_optimizer(task.towers, task.cfg)
    assert optimizer.held_state("vision") == [] and optimizer.held_state("text")
    assert rate.set(0).keys() == {"text", "scale"}


@pytest.mark.parametrize(("frozen", "num_passes"), [((), 4), (("vision",), 2)])
def test_it_makes_one_pass_for_each_microbatch(runtime: Runtime, frozen: Any, num_passes: int) -> None:
    """A trained tower makes two, the second with a backward pass."""
    task = Contrastive(make_recipe(replace(CASE, frozen=frozen)), runtime)
    passes: list[bool] = []
    task.model.vision.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    task.step(whole_batch(task.cfg, 0), lambda microbatch: seed_pass(0, 0, microbatch))
    assert passes == [False, False, True, True][:num_passes]


def test_it_stays_in_evaluation_mode_between_evaluations(runtime: Runtime) -> None:
    task = Contrastive(make_recipe(replace(CASE, frozen=("vision",))), runtime)
    for _ in range(2):
        assert task.model.training and task.model.text.training and not task.model.vision.training
        task.model.eval()
        assert not task.model.text.training
        task.model.train()  # as the harness does after an evaluation


@pytest.mark.parametrize("tower", [0, 1])
def test_a_parameter_without_a_rule_is_told_once(runtime: Runtime, tower: int) -> None:
    """Of a frozen tower too: it may be trained in the next run."""
    task = Contrastive(make_recipe(replace(CASE, frozen=("vision",))), runtime)
    task.towers[tower].module.gate = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(
        ParameterRuleError, match=r"^0 rules .* cover parameter 'gate'; .* megaeva/optim/param_groups.py\.$"
    ):
        build_optimizer(task.towers, task.cfg)
