"""Which device a run uses, and the shim that lets Megatron-core 0.16 run on CPU ranks with gloo.

The shim is three tables, each row with its reason: modules whose name `torch` is replaced by a view of torch that knows
no GPU, functions whose code compares against CUDA type names, and single symbols. Nothing is patched in torch itself
but `Tensor.cuda`, there is no mode that runs on every torch call, and on CUDA none of it is applied.

Importing this module guards `import megatron.core` against a broken Transformer Engine; import it first.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megaeva.errors import UserError

# Before anything asks for a GPU. mcore sends and computes in the order it issues both, to overlap them, which CUDA
# keeps on one connection only.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

# ------------------------------------------------------------------------------------------------ Transformer Engine


class _TolerantLoader(importlib.abc.Loader):
    """Runs another loader and reports whatever it raises as ImportError."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except Exception as error:
            transformer_engine_failure.append(f"{type(error).__name__}: {error}")
            # ModuleNotFoundError, as some mcore modules catch only that one.
            raise ModuleNotFoundError(f"transformer_engine is installed but broken ({error})") from error


class _TransformerEngineGuard(importlib.abc.MetaPathFinder):
    """A half-installed Transformer Engine raises OSError (a missing libnccl.so.2) when imported, and mcore, which
    expects ImportError, would pass it on from `import megatron.core`. Delete when mcore catches OSError there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "transformer_engine" and not fullname.startswith("transformer_engine."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _TolerantLoader(spec.loader)
        return spec


transformer_engine_failure: list[str] = []
"""Why importing an installed Transformer Engine failed, innermost first; empty when it works or is not installed."""

if not any(isinstance(finder, _TransformerEngineGuard) for finder in sys.meta_path):
    sys.meta_path.insert(0, _TransformerEngineGuard())


def require_transformer_engine() -> None:
    """Returns if Transformer Engine imports.

    Raises:
        UserError: it is not installed, or installed and broken; says how to mend it.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        reason = transformer_engine_failure[0] if transformer_engine_failure else str(error)
        raise UserError(
            f"layer_spec='te', which platform=cuda takes, needs Transformer Engine, and it does not import here "
            f"({reason}); it must be whole and built for this torch and CUDA; `megaeva doctor` says what is missing, "
            "tools/install_gpu.sh installs it."
        ) from error


# ------------------------------------------------------------------------------------------------------------- noise

# What mcore says on import and torch at each collective, which no user of ours can act on: apex is optional, and the
# renamed collectives are mcore's to call. Delete with the mcore version that no longer says it.
warnings.filterwarnings("ignore", message="Apex is not installed")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

if not torch.cuda.is_available():
    # Said by four mcore modules on every rank at import; on a CPU there are no other implementations to install.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"

# ----------------------------------------------------------------------------------------------------------- device

# Of parameters and activations, by train.parameter_precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(platform: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Returns the platform to run on: what was asked for, or for "auto" cuda where torch sees a GPU.

    Raises:
        UserError: cuda was asked for and torch sees no GPU.
    """
    if platform == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if platform == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "platform=cuda, but torch.cuda.is_available() is false; it must see a GPU: check `nvidia-smi` and that "
            f"torch {torch.__version__} is a CUDA build, or set platform=cpu."
        )
    return platform


def chip() -> str:
    """The name of this process's GPU and its compute capability, for messages; "a CPU" where there is none."""
    if not torch.cuda.is_available():
        return "a CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def host_memory(tensor: Tensor) -> Tensor:
    """Host memory for a tensor's values, contiguous; of a GPU's tensor page-locked, as `copier_to_host` wants it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def copier_to_host(sources: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    """A function that copies `sources` into host tensors, made for another thread than the one that computes.

    The values are those of the work queued when this is called; nothing may change them until the function returns.
    From a GPU they go through a stream of their own, beside what is computed meanwhile; that has not run on a GPU yet.
    """
    devices = {source.device for source in sources if source.is_cuda}
    if not devices:

        def copy(targets: Sequence[Tensor]) -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        return copy

    (device,) = devices
    stream, queued = torch.cuda.Stream(device), torch.cuda.current_stream(device).record_event()

    def copy_beside(targets: Sequence[Tensor]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_event(queued)
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            stream.synchronize()

    return copy_beside


# ------------------------------------------------------------------------------------------------------------- shim

_CORE = "megatron.core."
_BUCKETS = _CORE + "distributed.param_and_grad_buffer:"

# Modules that write device="cuda" or call torch.cuda: their global name `torch` becomes a view without a GPU.
TORCH_VIEWS: dict[str, str] = {
    _CORE + "tensor_parallel.mappings": "sequence-parallel gather and scatter buffers on current_device()",
    _CORE + "tensor_parallel.layers": "weights when not initialised on the CPU, sequence-parallel gradient buffers",
    _CORE + "tensor_parallel.random": "RNG tracker and recompute: the CPU generator plays the part of CUDA's",
    _CORE + "tensor_parallel.utils": "split and gather of 1-D chunks on current_device()",
    _CORE + "tensor_parallel.data": "broadcast_data gathers on current_device()",
    _CORE + "transformer.module": "buffers on current_device()",
    _CORE + "transformer.transformer_layer": "buffers on current_device()",
    _CORE + "transformer.utils": "attention masks with device='cuda'",
    _CORE + "distributed.distributed_data_parallel": "streams of several optimizer instances, synchronize()",
    _CORE + "distributed.param_and_grad_buffer": "gradient and parameter buffers on current_device()",
    _CORE + "distributed.finalize_model_grads": "gradient synchronisation at the end of a schedule",
    _CORE + "optimizer": "param groups and grad scaler",
    _CORE + "optimizer.optimizer": "found-inf flag and loss scale on current_device() and device='cuda'",
    _CORE + "optimizer.distrib_optimizer": "state gathers on current_device()",
    _CORE + "optimizer.clip_grads": "norms and the overflow buffer with device='cuda'",
    _CORE + "optimizer.grad_scaler": "scale tensors with device='cuda'",
    _CORE + "pipeline_parallel.schedules": "num_tokens with device='cuda' in every schedule, the no-pipeline one too",
    _CORE + "pipeline_parallel.p2p_communication": "receive buffers on current_device()",
    _CORE + "timers": "synchronize() around timers",
    _CORE + "utils": "global memory buffer on current_device(), nvtx ranges",
    _CORE + "dist_checkpointing.exchange_utils": "exchanged shards with device='cuda'",
    _CORE + "dist_checkpointing.strategies.async_utils": "queue agreement tensors on current_device()",
    _CORE + "dist_checkpointing.strategies.filesystem_async": "synchronize() before writing",
    _CORE + "dist_checkpointing.strategies.fully_parallel": "synchronize() around the exchange",
    _CORE + "dist_checkpointing.strategies.state_dict_saver": "failure count on current_device()",
    _CORE + "dist_checkpointing.tensor_aware_state_dict": "synchronize() before writing",
}

# Functions that compare Tensor.type() with CUDA type names: the names in their code lose the "cuda.".
TYPE_NAMES: dict[str, str] = {
    _CORE + "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": "sorts parameters by type name",
    _CORE + "optimizer.distrib_optimizer:DistributedOptimizer.__init__": "marks 16-bit parameters by type name",
    _CORE + "optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups": "sorts by type name",
    _CORE + "optimizer.clip_grads:clip_grad_by_total_norm_fp32": "asserts that gradients are fp32 by type name",
}


def _cpu_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _same_tensor(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self


@functools.cache
def gather_buffer() -> Any:
    """mcore's GlobalMemoryBuffer of this process: gathered sequences go through its one tensor of each dtype."""
    return importlib.import_module(_CORE + "utils").GlobalMemoryBuffer()


_coalescing: list[Any] = []  # what is being issued together, innermost last


@contextlib.contextmanager
def _coalescing_but_gathers(group: dist.ProcessGroup, async_ops: bool = False) -> Iterator[Any]:
    """torch's manager, for mcore's reduce-scatters; what `_gather_alone` issues inside is waited for with them."""
    with dist._coalescing_manager(group, async_ops=async_ops) as works:
        _coalescing.append(works)
        try:
            yield works
        finally:
            _coalescing.pop()


def _gather_alone(output: Tensor, shard: Tensor, group: dist.ProcessGroup, async_op: bool) -> None:
    """all_gather_into_tensor of a flat bucket inside `_coalescing_but_gathers`, as a collective of its own."""
    work = dist.all_gather(list(output.chunk(dist.get_world_size(group))), shard, group=group, async_op=async_op)
    _coalescing[-1].append(work)


def _in_plain_torch(name: str) -> Callable[..., Any]:
    """A function of megatron.core.utils that stands in for Transformer Engine's or apex's, which need a GPU."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(_CORE + "utils"), name)(*args)

    return call


# Single symbols and what stands in for them.
SYMBOLS: dict[str, tuple[Callable[..., Any], str]] = {
    _CORE + "tensor_parallel.random:_get_cuda_rng_state": (_cpu_rng_state, "tracker state from the CPU generator"),
    _CORE + "tensor_parallel.random:_set_cuda_rng_state": (_set_cpu_rng_state, "tracker state to the CPU generator"),
    _CORE + "tensor_parallel.layers:get_global_memory_buffer": (
        gather_buffer,
        "buffer of gathered sequences, which mcore makes with the groups that nothing here uses",
    ),
    _BUCKETS + "_coalescing_manager": (_coalescing_but_gathers, "knows of the gathers of the row below"),
    _BUCKETS + "dist_all_gather_func": (
        _gather_alone,
        "two coalesced gathers in flight corrupt the heap in torch 2.14's gloo: ranks die in malloc",
    ),
    **{
        f"{_CORE}optimizer.{symbol}": (_in_plain_torch(local), "kernels of an installed Transformer Engine are CUDA's")
        for symbol, local in (
            ("clip_grads:multi_tensor_applier", "local_multi_tensor_applier"),
            ("clip_grads:l2_norm_impl", "local_multi_tensor_l2_norm"),
            ("clip_grads:multi_tensor_scale_impl", "local_multi_tensor_scale"),
            ("optimizer:multi_tensor_applier", "local_multi_tensor_applier"),
            ("optimizer:multi_tensor_scale_impl", "local_multi_tensor_scale"),
        )
    },
    "torch:Tensor.cuda": (_same_tensor, "mcore moves optimizer state with .cuda(); on CPU it is where it should be"),
}

_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "rand", "randn",
    "empty_like", "zeros_like", "ones_like", "full_like",
)  # fmt: skip


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


class _View(ModuleType):
    """A module that shows another's names, except those set on it."""

    def __init__(self, module: ModuleType, **own: Any) -> None:
        super().__init__(module.__name__)
        # Copied, so that the common lookups cost what they cost on torch itself.
        self.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")} | own)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


@functools.cache
def _torch_on_cpu() -> _View:
    """torch without a GPU: factories put device="cuda" on the CPU, torch.cuda's device is the CPU."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cuda = _View(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=nothing,
        empty_cache=nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=_cpu_rng_state,
        set_rng_state=_set_cpu_rng_state,
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing),
    )
    return _View(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _torch_in_rng_module() -> _View:
    """As `_torch_on_cpu`, for the module that treats the CPU's and CUDA's generator as two: here they are one, which
    it knows as CUDA's. Its own view of the CPU generator must be empty, or every fork of the tracker would be
    reported as a stray change of the CPU generator and undone twice."""
    own = dict(vars(_torch_on_cpu()))
    own.update(get_rng_state=lambda: torch.zeros(1, dtype=torch.uint8), set_rng_state=lambda state: None)
    return _View(torch, **{k: v for k, v in own.items() if not k.startswith("__")})


def resolve(symbol: str) -> tuple[Any, str]:
    """Returns (owner, attribute name) of "package.module:Qualified.name", importing the module.

    Raises:
        AttributeError: the installed package has no such symbol.
    """
    module_name, _, path = symbol.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    getattr(owner, name)
    return owner, name


def without_cuda(value: Any) -> Any:
    """Returns a code constant with CUDA type names replaced by the CPU's, inner functions and tuples included."""
    if isinstance(value, str):
        return value.replace("torch.cuda.", "torch.")
    if isinstance(value, tuple):
        return tuple(without_cuda(item) for item in value)
    if isinstance(value, CodeType):
        return value.replace(co_consts=without_cuda(value.co_consts))
    return value


_applied = False


def apply_cpu_shim() -> None:
    """Applies the three tables to the installed Megatron-core, once; later calls do nothing.

    Raises:
        AttributeError, ModuleNotFoundError: a named symbol is missing, that is, mcore is not the pinned version.
    """
    global _applied
    if _applied:
        return
    for module_name in TORCH_VIEWS:
        is_rng = module_name.endswith("tensor_parallel.random")
        owner, name = resolve(module_name + ":torch")
        setattr(owner, name, _torch_in_rng_module() if is_rng else _torch_on_cpu())
    for symbol in TYPE_NAMES:
        owner, name = resolve(symbol)
        function = getattr(owner, name)
        function = getattr(function, "__func__", function)
        function.__code__ = without_cuda(function.__code__)
    for symbol, (replacement, _) in SYMBOLS.items():
        owner, name = resolve(symbol)
        setattr(owner, name, replacement)
    _applied = True
