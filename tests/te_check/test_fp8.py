"""FP8 recipes and steps against Transformer Engine's own bookkeeping; its kernels are plain PyTorch here."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, get_align_size_for_quantization

from megaeva.config.schema import Fp8Section
from megaeva.errors import UserError
from megaeva.model import VisionTower, set_recompute
from megaeva.model import transformer_engine as backend
from megaeva.model.transformer_engine import check_chip, te_recipe, te_step
from tests.helpers.tiny import example_images, full_shapes, load_full, random_state, single_grid, tiny
from tests.te_check.without_gpu import computable

VARIANT = "EVA02-CLIP-L-14"


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    FP8GlobalStateManager.reset()


@pytest.mark.parametrize("name", ["delayed", "current", "mxfp8", "blockwise"])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_recipes_hold_what_the_section_says(name: Any, form: Any) -> None:
    section = Fp8Section(recipe=name, format=form, amax_history=7, amax_compute="most_recent", margin=2)
    recipe = te_recipe(section)
    assert recipe is te_recipe(section.model_copy())
    assert recipe.fp8_format == {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[form]
    assert not recipe.fp8_dpa and not recipe.fp8_mha
    asks = [recipe.delayed(), recipe.float8_current_scaling(), recipe.mxfp8(), recipe.float8_block_scaling()]
    assert asks.index(True) == ["delayed", "current", "mxfp8", "blockwise"].index(name) and sum(asks) == 1
    if name == "delayed":
        assert (recipe.margin, recipe.amax_history_len, recipe.amax_compute_algo) == (2, 7, "most_recent")
        assert recipe.reduce_amax


def test_rows_are_padded_to_what_transformer_engine_asks_for() -> None:
    for name in ("delayed", "current", "mxfp8", "blockwise"):
        section = Fp8Section(recipe=name)  # type: ignore[arg-type]
        for sequence_parallel in (False, True):
            multiple = backend._row_multiple(section, overlap=False, sequence_parallel=sequence_parallel)
            assert multiple % get_align_size_for_quantization(te_recipe(section)) == 0


@pytest.mark.parametrize(
    ("capability", "works"),
    [
        ((8, 0), ()),  # A100
        ((8, 9), ("delayed", "current")),  # L40
        ((9, 0), ("delayed", "current", "blockwise")),  # H100
        ((10, 0), ("delayed", "current", "blockwise", "mxfp8")),  # B200
    ],
)
def test_a_chip_that_cannot_is_named(capability: tuple[int, int], works: tuple[str, ...]) -> None:
    from transformer_engine.pytorch import quantization

    answers = {"_FP8_SUPPORT": None, "_MXFP8_SUPPORT": None, "_FP8_BLOCK_SCALING_SUPPORT": None}
    with (
        mock.patch.multiple(quantization, **answers),
        mock.patch.object(quantization, "get_device_compute_capability", return_value=capability),
        mock.patch.object(quantization.tex, "get_cublasLt_version", return_value=130000),
        mock.patch.object(backend, "chip", return_value="NVIDIA X"),
    ):
        for name in ("delayed", "current", "mxfp8", "blockwise"):
            section = Fp8Section(recipe=name)  # type: ignore[arg-type]
            if name in works:
                check_chip(section)
            else:
                with pytest.raises(UserError, match=f"recipe={name} cannot run on NVIDIA X; .*ompute capability"):
                    check_chip(section)


def _tower(section: Fp8Section) -> VisionTower:
    with mock.patch.object(backend, "check_chip"):
        tower = VisionTower(tiny(VARIANT).vision, 20, grid=single_grid(), layer_spec="te", fp8=section)
    load_full(tower, random_state(full_shapes(tower)), single_grid())
    return tower


def _linears(tower: VisionTower) -> dict[str, Any]:
    return {n: m for n, m in tower.named_modules() if isinstance(m, backend._Linear)}


def _step(tower: VisionTower, section: Fp8Section, passes: int = 2) -> list[str]:
    """A step as the trainer's: a pass without gradients, then `passes` with; what was reduced, in order."""
    reduced: list[str] = []

    def note(forward: bool = True) -> None:
        reduced.append("forward" if forward else "backward")

    images = example_images(tiny(VARIANT))
    wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
    with mock.patch.object(FP8GlobalStateManager, "reduce_and_update_fp8_tensors", note):
        with te_step([wrapped], section):
            with torch.no_grad():
                tower(images)
            for _ in range(passes):
                tower(images).square().sum().backward()
                assert reduced == [], "the step is not over"
    return reduced


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_is_one_context_around_all_its_passes(recompute: Any) -> None:
    section = Fp8Section(first_layers_bf16=1, last_layers_bf16=0, linears=("qkv", "fc1"))
    with computable():
        tower = _tower(section)
        set_recompute(tower, recompute)
        assert sorted(_step(tower, section)) == ["backward", "forward"]
    assert FP8GlobalStateManager.quantization_state.autocast_depth == 0
    assert not FP8GlobalStateManager.is_fp8_enabled()
    for name, linear in _linears(tower).items():
        in_fp8 = not name.startswith("blocks.layers.0.") and name.endswith(("linear_qkv", "linear_fc1"))
        passes = 3 if recompute == "none" else 5
        assert len(linear.calls) == passes, name
        assert [call["fp8"] for call in linear.calls] == [in_fp8] * passes, name
        if in_fp8:
            assert all(call["recipe"] is te_recipe(section) for call in linear.calls)
            assert all(call["group"] is tower.grid.groups.tp_dp_cp for call in linear.calls)
            assert [call["first"] for call in linear.calls] == [True] + [False] * (passes - 1), "weights quantised once"
            assert all(call["rows"] % 16 == 0 for call in linear.calls), "17 tokens x 3 images are 51 rows"
        else:
            assert all(call["rows"] == 51 for call in linear.calls)


def test_the_next_step_quantises_the_weights_again() -> None:
    section = Fp8Section(first_layers_bf16=0, last_layers_bf16=0)
    with computable():
        tower = _tower(section)
        for _ in range(2):
            _step(tower, section, passes=1)
    assert [call["first"] for call in _linears(tower)["blocks.layers.1.mlp.linear_fc2"].calls] == [True, False] * 2


def test_evaluation_and_passes_outside_a_step_keep_nothing() -> None:
    section = Fp8Section(first_layers_bf16=0, last_layers_bf16=0)
    with computable():
        tower = _tower(section)
        wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
        images = example_images(tiny(VARIANT))
        with mock.patch.object(FP8GlobalStateManager, "reduce_and_update_fp8_tensors"):
            tower.eval()
            tower(images)
            with te_step([wrapped], section):
                tower(images)  # as a teacher's, inside the student's step
            tower.train()
            tower(images)
    for linear in _linears(tower).values():
        assert [call["fp8"] for call in linear.calls] == [False, False, True]
        assert [call["first"] for call in linear.calls][::2] == [None, None]


def test_an_error_in_a_step_reduces_nothing() -> None:
    section = Fp8Section()
    reduce = mock.Mock()
    with computable(), mock.patch.object(FP8GlobalStateManager, "reduce_and_update_fp8_tensors", reduce):
        wrapped: Any = SimpleNamespace(module=_tower(section), grid=single_grid())
        with pytest.raises(ZeroDivisionError), te_step([wrapped], section):
            raise ZeroDivisionError
    reduce.assert_not_called()
    assert FP8GlobalStateManager.quantization_state.autocast_depth == 0 and not FP8GlobalStateManager.is_fp8_enabled()


def test_histories_get_one_entry_a_step() -> None:
    """Transformer Engine's buffers and its unfused update, on the CPU: what te_step closes is one entry."""
    section = Fp8Section(amax_history=4, first_layers_bf16=0, last_layers_bf16=0)
    group = single_grid().groups.tp_dp_cp
    from transformer_engine.pytorch.quantization import RecipeState

    states = {}
    for key, mode in (("scaling_fwd", "forward"), ("scaling_bwd", "backward")):
        states[key] = RecipeState.create(te_recipe(section), mode=mode, num_quantizers=3, device=torch.device("cpu"))
    meta = {"recipe": te_recipe(section), "fp8_group": group, **states}
    unfused = mock.patch.dict("os.environ", {"NVTE_UNFUSED_FP8_UPDATE": "1"})
    with computable(), unfused, torch.compiler.set_stance("force_eager"):
        tower = _tower(section)
        wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
        for step in range(2):
            with te_step([wrapped], section):
                with backend.autocast(recipe=te_recipe(section), amax_reduction_group=group):
                    FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(meta)
                for value in (1.0, 4.0 + step, 2.0):  # passes; the cast kernels take the maximum
                    for state in states.values():
                        state.amax_history[0].clamp_(min=value)
                assert all((state.scale == (1.0 if step == 0 else 112.0)).all() for state in [states["scaling_fwd"]])
    forward, backward = states["scaling_fwd"], states["scaling_bwd"]
    assert sorted(forward.amax_history[:, 0].tolist()) == [0.0, 0.0, 4.0, 5.0]
    assert torch.allclose(forward.scale, torch.tensor(448.0 / 5.0)) and torch.allclose(
        backward.scale, torch.tensor(57344.0 / 5.0)
    )
