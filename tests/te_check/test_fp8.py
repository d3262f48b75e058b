"""FP8 recipes and steps against Transformer Engine's own bookkeeping; its kernels are plain PyTorch here."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, get_align_size_for_quantization

from megaeva.checkpoint.pieces import run_state_pieces
from megaeva.config.schema import Fp8Section
from megaeva.errors import UserError
from megaeva.model import VisionTower, set_recompute
from megaeva.model import transformer_engine as backend
from megaeva.model.fp8 import fp8_figures
from megaeva.model.transformer_engine import check_chip, te_recipe, te_step
from tests.helpers.tiny import example_images, full_shapes, load_full, random_state, tiny
from tests.te_check.without_gpu import bookkeeping, computable, one_grid

CFG = tiny("EVA02-CLIP-L-14", ffn_hidden_size=48)  # FP8 takes multiples of 16


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
        tower = VisionTower(CFG.vision, 20, grid=one_grid(), layer_spec="te", fp8=section)
    load_full(tower, random_state(full_shapes(tower)), one_grid())
    return tower


def _linears(tower: VisionTower) -> dict[str, Any]:
    return {n: m for n, m in tower.named_modules() if isinstance(m, backend._Linear)}


def _step(tower: VisionTower, section: Fp8Section, passes: int = 2) -> list[str]:
    """A step as the trainer's: a pass without gradients, then `passes` with; what was reduced, in order."""
    reduced: list[str] = []

    def note(forward: bool = True) -> None:
        reduced.append("forward" if forward else "backward")

    images = example_images(CFG)
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
        images = example_images(CFG)
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
        wrapped: Any = SimpleNamespace(module=_tower(section), grid=one_grid())
        with pytest.raises(ZeroDivisionError), te_step([wrapped], section):
            raise ZeroDivisionError
    reduce.assert_not_called()
    assert FP8GlobalStateManager.quantization_state.autocast_depth == 0 and not FP8GlobalStateManager.is_fp8_enabled()


def test_histories_get_one_entry_a_step() -> None:
    """The largest value of all passes, of what each linear saw, in Transformer Engine's own modules and buffers."""
    section = Fp8Section(amax_history=4, first_layers_bf16=1, last_layers_bf16=0)
    seen: dict[str, list[float]] = {}
    with bookkeeping():
        tower = _tower(section)
        in_fp8 = {name: linear for name, linear in _linears(tower).items() if not name.startswith("blocks.layers.0.")}
        for name, linear in in_fp8.items():
            linear.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].abs().max().item())
            )
        wrapped: Any = SimpleNamespace(name="vision", module=tower, grid=tower.grid)
        images = example_images(CFG)
        largest: dict[str, list[float]] = {name: [] for name in in_fp8}
        for step in range(3):
            seen.clear()
            with te_step([wrapped], section):
                with torch.no_grad():
                    tower(images)
                for factor in (1.0, 2.0 + step, 0.5):  # passes whose values differ
                    tower(factor * images).square().sum().backward()
            for name in in_fp8:
                largest[name].append(max(seen[name]))
    figures = fp8_figures([wrapped])
    assert figures["fp8_amax/vision/input"] == pytest.approx(max(values[-1] for values in largest.values()))
    weights = [linear.weight.detach().abs().max().item() for linear in in_fp8.values()]
    assert figures["fp8_amax/vision/weight"] == pytest.approx(max(weights))
    gradients = [linear.fp8_meta["scaling_bwd"].amax_history[-1, 0].item() for linear in in_fp8.values()]
    assert figures["fp8_amax/vision/gradient"] == max(gradients)
    for name, linear in in_fp8.items():
        state = linear.fp8_meta["scaling_fwd"]
        history = state.amax_history[:, 0].tolist()
        assert history == pytest.approx([0.0, *largest[name]]), name  # row 0 is the step to come
        assert state.scale[0].item() == pytest.approx(448.0 / max(largest[name])), name
        weight = linear.weight.detach().abs().max().item()
        assert state.amax_history[:, 1].tolist() == pytest.approx([0.0, *[weight] * 3]), name
        gradients = linear.fp8_meta["scaling_bwd"].amax_history[:, 0]
        assert gradients[0] == 0 and (gradients[1:] > 0).all(), name
    for name, linear in _linears(tower).items():
        if name not in in_fp8:
            assert "scaling_fwd" not in linear.fp8_meta, name


def test_a_repeated_pass_sees_the_scales_of_the_first() -> None:
    section = Fp8Section(amax_history=4, first_layers_bf16=0, last_layers_bf16=0)
    with bookkeeping():
        tower = _tower(section)
        wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
        linear = _linears(tower)["blocks.layers.1.mlp.linear_fc1"]
        scales = []
        linear.register_forward_hook(lambda *_: scales.append(linear.fp8_meta["scaling_fwd"].scale.clone()))
        images = example_images(CFG)
        for _ in range(2):
            with te_step([wrapped], section):
                with torch.no_grad():
                    tower(images)
                tower(images).square().sum().backward()
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[2], scales[3])
    assert not torch.equal(scales[1], scales[2])


def test_a_resumed_run_goes_on_with_its_scales() -> None:
    section = Fp8Section(amax_history=4, first_layers_bf16=1, last_layers_bf16=0)

    def steps(tower: VisionTower, factors: list[float]) -> None:
        wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
        for factor in factors:
            with te_step([wrapped], section):
                tower(factor * example_images(CFG)).square().sum().backward()

    def pieces(tower: VisionTower) -> dict[str, Any]:
        return {piece.key: piece for piece in run_state_pieces(tower, "vision.", tower.grid)}

    with bookkeeping():
        whole = _tower(section)
        assert all(piece.data.unique().numel() == 1 for piece in pieces(whole).values()), "ones and zeros"
        steps(whole, [1.0, 3.0])
        saved = {key: piece.data for key, piece in pieces(whole).items()}
        before = {key: data.clone() for key, data in saved.items()}
        steps(whole, [2.0])
        assert all(torch.equal(saved[key], before[key]) for key in saved), "a save in flight keeps its values"
        FP8GlobalStateManager.reset()
        resumed = _tower(section)
        for key, piece in pieces(resumed).items():
            piece.data.copy_(saved[key])
        steps(resumed, [2.0])
        goes_on, after = pieces(whole), pieces(resumed)
    assert len(saved) == 4 * 4 * 2, "four tensors of four linears in two layers"
    assert goes_on.keys() == after.keys()
    assert all(torch.equal(goes_on[key].data, after[key].data) for key in goes_on)
    assert not all(torch.equal(goes_on[key].data, saved[key]) for key in goes_on)


@pytest.mark.parametrize("name", ["current", "mxfp8", "blockwise"])
def test_other_recipes_pass_through_the_real_modules(name: Any) -> None:
    """Their quantizers are made and their checks of shapes pass; they keep no state."""
    section = Fp8Section(recipe=name, first_layers_bf16=0, last_layers_bf16=0)
    from transformer_engine.pytorch import quantization

    yes = mock.Mock(return_value=(True, ""))
    kinds = set()
    with (
        bookkeeping(),
        mock.patch.multiple(
            quantization, check_mxfp8_support=yes, check_fp8_block_scaling_support=yes, check_fp8_support=yes
        ),
    ):
        tower = _tower(section)
        wrapped: Any = SimpleNamespace(module=tower, grid=tower.grid)
        with mock.patch("tests.te_check.without_gpu._observe"), te_step([wrapped], section):
            tower(example_images(CFG)).square().sum().backward()
        for linear in _linears(tower).values():
            kinds |= {type(quantizer).__name__ for quantizer in linear.quantizers["scaling_fwd"]}
    expected = {
        "current": "Float8CurrentScalingQuantizer",
        "mxfp8": "MXFP8Quantizer",
        "blockwise": "Float8BlockQuantizer",
    }
    assert kinds == {expected[name]}
