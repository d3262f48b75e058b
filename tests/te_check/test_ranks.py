"""Transformer Engine's modules over two gloo ranks, with sequence parallelism and padded rows."""

from typing import Any
from unittest import mock

import pytest
import torch

from megaeva.config.schema import AxesSection, Fp8Section
from megaeva.config.variants import VARIANTS
from megaeva.model import VisionTower
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import gather_full
from megaeva.parallel.wrap import reduce_gradients, wrap
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, full_shapes, load_full, random_state, tiny
from tests.te_check.test_towers import described
from tests.te_check.without_gpu import computable

SECTION = Fp8Section(first_layers_bf16=0, last_layers_bf16=1, linears=("qkv", "proj", "fc2"))


def _compare(runtime: Runtime, sequence_parallel: bool, variants: list[str]) -> dict[str, dict[str, float]]:
    """The largest relative difference of each variant's embeddings and of its worst gradient, fp8 contexts on."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megaeva.config.schema import ParallelSection
    from megaeva.model import transformer_engine as backend

    axes = AxesSection(tp=2, sequence_parallel=sequence_parallel)
    grid = build_grid(axes, runtime)
    found = {}
    for variant in variants:
        cfg = tiny(variant)
        images = example_images(cfg)
        results: list[Any] = []
        names = []
        for layer_spec, fp8 in (("local", None), ("te", SECTION)):
            with computable(), mock.patch.object(backend, "check_chip"):
                module = VisionTower(cfg.vision, 20, grid=grid, layer_spec=layer_spec, fp8=fp8)  # type: ignore[arg-type]
                names.append(described(module))
                load_full(module, random_state(full_shapes(module, 2)), grid)
                tower = wrap("vision", module, grid, ParallelSection(vision=axes))
                with mock.patch.object(FP8GlobalStateManager, "reduce_and_update_fp8_tensors"):
                    step: Any = backend.te_step([tower], SECTION) if fp8 else mock.MagicMock()
                    with step:
                        out = tower.ddp(images)
                        (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
                reduce_gradients([tower])
                grads = {n: gather_full(p.main_grad, p, grid) for n, p in module.named_parameters()}
                results.append((out.detach(), grads))
                linears = [m for m in module.modules() if isinstance(m, backend._Linear)]
        assert names[0] == names[1]
        in_fp8 = [call for linear in linears for call in linear.calls if call["fp8"]]
        assert in_fp8 and all(call["rows"] % 16 == 0 for call in in_fp8)
        (out, grads), (engine_out, engine_grads) = results
        gradient = max(((engine_grads[n] - g).norm() / (g.norm() + 1e-6)).item() for n, g in grads.items())
        found[variant] = {"out": ((engine_out - out).abs().max() / out.abs().max()).item(), "gradient": gradient}
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_give_the_local_specs_numbers(sequence_parallel: bool) -> None:
    for differences in run_ranks(_compare, 2, sequence_parallel, list(VARIANTS)):
        assert differences.keys() == VARIANTS.keys()
        for variant, figures in differences.items():
            assert figures["out"] < 2e-5, (variant, figures)
            assert figures["gradient"] < 1e-4, (variant, figures)


def _overlap(runtime: Runtime) -> list[tuple[str, bool]]:
    """Which passes use the buffers; Transformer Engine's own initialisation is replaced, its constructors are not."""
    from transformer_engine.pytorch.module import base, linear

    from megaeva.model import transformer_engine as backend

    axes = AxesSection(tp=2, sequence_parallel=True, tp_comm_overlap=True)
    grid = build_grid(axes, runtime)
    cfg = tiny("EVA02-CLIP-L-14")
    asked: dict[str, Any] = {}
    with (
        computable(),
        mock.patch.object(backend, "initialize_ub", lambda **given: asked.update(given)),
        mock.patch.object(linear, "is_ub_initialized", return_value=True),
    ):
        before = VisionTower(cfg.vision, 20, grid=grid, layer_spec="te")
        assert not any(m._overlap for m in before.modules() if isinstance(m, backend._Linear)), "no buffers yet"
        shape = {"length": 18, "batch": 3, "hidden_size": 32}
        backend.start_overlap(**shape, tp_size=2, dtype=torch.float32, fp8=None)
        module = VisionTower(cfg.vision, 20, grid=grid, layer_spec="te")
        load_full(module, random_state(full_shapes(module, 2)), grid)
        used = []
        for batch in (3, 5):
            module(example_images(cfg, batch))
            for name, part in module.named_modules():
                if isinstance(part, backend._Linear):
                    flags = [getattr(part, flag) for flag in backend._OVERLAPS]
                    kind = name.rsplit(".", 1)[-1]
                    column = [True, False, False] if kind in ("linear_qkv", "linear_fc1") else [False, True, True]
                    assert flags == [batch == 3 and flag for flag in column], (name, batch, flags)
                    assert part.ub_name == kind.removeprefix("linear_")
                    used.append((kind, any(flags)))
    assert not base.is_ub_initialized()
    assert asked["shape"] == [64, 32] and asked["quantization_modes"] == [base.UserBufferQuantizationMode.NONE]
    return used


def test_transfers_overlap_in_passes_of_the_training_shape_only() -> None:
    for used in run_ranks(_overlap, 2):
        assert len(used) == 2 * 3 * 4 and sum(flag for _, flag in used) == 3 * 4
