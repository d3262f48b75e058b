"""Towers of every variant on Transformer Engine's modules: parameters and numbers are those of plain PyTorch."""

import pytest
import torch

from megaeva.checkpoint.pieces import module_pieces
from megaeva.config.variants import VARIANTS
from megaeva.model import MIMStudent, TextTower, VisionTower, set_recompute
from megaeva.model.layer_specs import LayerSpec
from tests.helpers.tiny import example_images, example_tokens, full_shapes, load_full, random_state, tiny
from tests.te_check.without_gpu import computable, constructible, one_grid

ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce")


def vision(variant: str, layer_spec: LayerSpec) -> VisionTower:
    return VisionTower(tiny(variant).vision, 20, grid=one_grid(), layer_spec=layer_spec)


def text(variant: str, layer_spec: LayerSpec) -> TextTower:
    return TextTower(tiny(variant).text, 20, grid=one_grid(), layer_spec=layer_spec)


def described(module: torch.nn.Module) -> dict[str, tuple[object, ...]]:
    """Shape, dtype and what mcore and checkpoints read, of every parameter."""
    return {
        name: (tuple(p.shape), p.dtype, p.requires_grad, *(getattr(p, a, "absent") for a in ATTRIBUTES))
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", [vision, text])
def test_parameters_are_those_of_the_local_spec(variant: str, build) -> None:  # type: ignore[no-untyped-def]
    local = build(variant, "local")
    with constructible():
        engine = build(variant, "te")
    kinds = {type(module).__module__ for module in engine.modules()}
    assert any(kind.startswith("transformer_engine") for kind in kinds), "nothing of Transformer Engine is in it"
    assert described(engine) == described(local)


@pytest.mark.parametrize("variant", VARIANTS)
def test_records_of_a_checkpoint_are_those_of_the_local_spec(variant: str) -> None:
    grid = one_grid()
    with constructible():
        engine = vision(variant, "te")
        extra = [name for name in engine.state_dict() if name.endswith("_extra_state")]
    assert extra, "Transformer Engine no longer has extra state; delete what skips it"
    records = [
        [(piece.key, piece.whole, piece.offset, piece.data.dtype) for piece in module_pieces(tower, "vision.", grid)]
        for tower in (engine, vision(variant, "local"))
    ]
    assert sorted(records[0]) == sorted(records[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_those_of_the_local_spec(variant: str) -> None:
    cfg = tiny(variant)
    inputs = {vision: example_images(cfg), text: example_tokens(cfg)}
    for build, batch in inputs.items():
        local = build(variant, "local")
        state = random_state(full_shapes(local))
        results = []
        with computable():
            for tower in (local, build(variant, "te")):
                load_full(tower, state, one_grid())
                out = tower(batch)
                (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
                results.append((out, {name: p.grad for name, p in tower.named_parameters()}))
        (out, gradients), (engine_out, engine_gradients) = results
        assert (engine_out - out).abs().max() < 2e-5 * out.abs().max()
        for name, gradient in gradients.items():
            assert gradient is not None and engine_gradients[name] is not None, name
            assert (engine_gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("mode", ["selective", "full", 2])
def test_recompute_changes_nothing(mode: str) -> None:
    cfg = tiny("EVA02-CLIP-L-14")
    gradients = []
    with computable():
        for recompute in ("none", mode):
            tower = vision("EVA02-CLIP-L-14", "te")
            load_full(tower, random_state(full_shapes(tower)), one_grid())
            set_recompute(tower, recompute)  # type: ignore[arg-type]
            tower(example_images(cfg)).square().sum().backward()
            gradients.append([p.grad for p in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_student_has_the_local_specs_parameters() -> None:
    cfg = tiny("EVA02-CLIP-L-14").vision
    local = MIMStudent(cfg, 20, grid=one_grid())
    with constructible():
        engine = MIMStudent(cfg, 20, grid=one_grid(), layer_spec="te")
    assert described(engine) == described(local)
