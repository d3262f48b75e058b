"""The CPU shim: its symbols exist, and Megatron-core's parts run under it."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megaeva.config.schema import AxesSection
from megaeva.errors import UserError
from megaeva.parallel import platform
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.runtime import Runtime
from tests.helpers.spawn import run_ranks


@pytest.mark.parametrize("module", platform.TORCH_VIEWS)
def test_patched_modules_exist_and_use_torch(module: str) -> None:
    # Applying twice must be harmless, and afterwards the module must see the view.
    platform.apply_cpu_shim()
    platform.apply_cpu_shim()
    view = importlib.import_module(module).torch
    assert view.cuda.current_device() == torch.device("cpu")
    assert view.zeros(1, device="cuda").device.type == "cpu"
    assert view.Tensor is torch.Tensor


@pytest.mark.parametrize("symbol", [*platform.TYPE_NAMES, *platform.SYMBOLS])
def test_patched_symbols_exist(symbol: str) -> None:
    owner, name = platform.resolve(symbol)
    assert callable(getattr(owner, name))


@pytest.mark.parametrize("symbol", platform.TYPE_NAMES)
def test_type_names_are_there_to_be_patched(symbol: str) -> None:
    # The sources, as another test may have applied the shim in this process.
    module, _, _ = symbol.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert (
        "'torch.cuda.FloatTensor'" in Path(spec.origin).read_text()
        or "'torch.cuda.HalfTensor'" in Path(spec.origin).read_text()
    )
    platform.apply_cpu_shim()
    owner, name = platform.resolve(symbol)
    function = getattr(getattr(owner, name), "__func__", getattr(owner, name))
    assert "torch.cuda." not in repr(_constants(function.__code__))
    assert "Tensor'" in repr(_constants(function.__code__))


def _constants(code: types.CodeType) -> list[object]:
    found: list[object] = []
    for constant in code.co_consts:
        found += _constants(constant) if isinstance(constant, types.CodeType) else [constant]
    return found


def test_torch_itself_is_left_alone() -> None:
    platform.apply_cpu_shim()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda:7")


def test_broken_transformer_engine_does_not_break_mcore(tmp_path: Path) -> None:
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libnccl.so.2: cannot open shared object file')\n")
    program = (
        "from megaeva.parallel import grid, platform\n"
        "import megatron.core.transformer.transformer_layer\n"
        "try:\n    platform.require_transformer_engine()\n"
        "except platform.UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "libnccl.so.2" in done.stdout and "megaeva doctor" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_a_user_error() -> None:
    with pytest.raises(UserError, match="platform=cpu"):
        platform.choose("cuda")
    assert platform.choose("auto") == "cpu"


def _mcore_parts(runtime: Runtime, axes: AxesSection, bf16: bool) -> dict[str, float]:
    """Two optimizer steps of a linear pair through mcore's DDP, distributed optimizer and schedule."""
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    grid = build_grid(axes, runtime)
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=axes.tp,
        use_cpu_initialization=True, params_dtype=dtype, bf16=bf16, pipeline_dtype=dtype,
    )  # fmt: skip

    class Pair(MegatronModule):
        def __init__(self, grid: Grid) -> None:
            super().__init__(config)
            self.model_type = ModelType.encoder_or_decoder
            torch.manual_seed(0)
            init = torch.nn.init.normal_
            shared = {"config": config, "init_method": init, "bias": True, "tp_group": grid.groups.tp}
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                4, 8, init_method=init, config=config, tp_group=grid.groups.tp
            )
            self.up = tensor_parallel.ColumnParallelLinear(8, 16, **shared)
            self.down = tensor_parallel.RowParallelLinear(16, 8, input_is_parallel=True, skip_bias_add=False, **shared)

        def set_input_tensor(self, tensor: object) -> None:
            pass

        def forward(self, token_BL: torch.Tensor) -> torch.Tensor:
            def inner(x: torch.Tensor) -> torch.Tensor:
                return self.down(torch.relu(self.up(x)[0]))[0]

            return tensor_parallel.checkpoint(inner, False, self.embedding(token_BL))

    tensor_parallel.random.model_parallel_cuda_manual_seed(1, tp_rank=grid.tp_rank, ep_rank=0, etp_rank=0)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(()).item()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        second = torch.rand(()).item()
    assert first != second
    model = Pair(grid)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        model,
        pg_collection=grid.groups,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=0.01, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=grid.groups,
    )
    losses = []
    config.finalize_model_grads_func = None
    for _ in range(2):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        batches = iter([torch.tensor([[0, 1], [2, 3]])] * 2)

        def forward(batches, module):  # type: ignore[no-untyped-def]
            out = module(next(batches))
            return out, lambda output: ((output.float() ** 2).mean(), {"loss": (output.float() ** 2).mean().detach()})

        reports = forward_backward_no_pipelining(
            forward_step_func=forward, data_iterator=batches, model=ddp, num_microbatches=2, seq_length=2,
            micro_batch_size=2, pg_collection=grid.groups,
        )  # fmt: skip
        ddp.finish_grad_sync()
        ok, norm, _ = optimizer.step()
        assert ok
        losses.append(reports[0]["loss"].item())
    return {"first": losses[0], "second": losses[1], "norm": float(norm), "draw": first}


@pytest.mark.slow  # four real processes
@pytest.mark.parametrize("bf16", [False, True])
def test_mcore_trains_on_cpu_ranks(bf16: bool) -> None:
    axes = AxesSection(tp=2)
    results = run_ranks(_mcore_parts, 4, axes, bf16)
    assert results[0]["second"] < results[0]["first"]
    assert {(r["first"], r["second"], r["norm"]) for r in results} == {
        (results[0]["first"], results[0]["second"], results[0]["norm"])
    }
    draws = [r["draw"] for r in results]
    assert draws[0] == draws[2] != draws[1] == draws[3]  # differs over tp, alike over dp
