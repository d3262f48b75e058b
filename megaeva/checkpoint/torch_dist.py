"""Reading and writing sharded tensors in mcore's `torch_dist` format (torch.distributed.checkpoint files).

A folder written here is read by `megatron.core.dist_checkpointing.load`, but its `save` and `load` are not called:
`save` starts a process pool and a manager that need a __main__ guard and seconds, and a failure of its rank 0 leaves
the others waiting; `load` unpickles. Here ranks write in their own process and torch reports failures to all of them.

What is trusted: tensors are read with torch.load(weights_only=True); `.metadata` is a pickle by format and is read by
an unpickler that knows the dozen classes of torch.distributed.checkpoint and nothing else, so a crafted file ends in
an error and runs nothing. `common.pt` is written (an empty dictionary, for mcore) and never read.
"""

# Before anything here imports megatron.core: it guards that import against a broken Transformer Engine.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

ALLOWED_GLOBALS: frozenset[tuple[str, str]] = frozenset(
    {("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )}
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
    | {("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")}
)  # fmt: skip
"""What `.metadata` may name. Constructors of plain records and torch constants: none of them acts."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader with the restricted unpickler."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def read_metadata(folder: Path) -> Metadata:
    """Shapes and places of the tensors in a checkpoint folder.

    Raises:
        OSError: `.metadata` is not readable.
        pickle.UnpicklingError: it is not a checkpoint's metadata.
    """
    raw = (folder / ".metadata").read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """{key: whole shape} of all tensors of a checkpoint."""
    entries = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def plan_write(state: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank writes of a nested dictionary of sharded tensors. All ranks call it; consumes `state`.

    Raises:
        megatron.core.dist_checkpointing.core.CheckpointingException: on rank 0 only, pieces that do not make up the
            whole tensors.
    """
    pieces, rest = save_preprocess(dict(state))
    assert not rest, f"only sharded tensors are written, not {list(rest)}"
    mine: dict[str, list[ShardedTensor]] = defaultdict(list)
    for piece in nested_values(pieces):
        if is_main_replica(piece.replica_id):
            mine[piece.key].append(piece)
    return mcore_to_pyt_state_dict(mine, False)


def num_bytes(state: Mapping[str, Any]) -> int:
    """Size of a nested dictionary of sharded tensors on this rank, replicas included."""
    return sum(value.data.numel() * value.data.element_size() for value in nested_values(dict(state)))


def write(plan: dict[str, Any], folder: Path) -> None:
    """Write all ranks' plans to a folder that exists and force them to the disk. All ranks call it.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: on every rank, when one cannot write.
    """
    dcp.save(
        plan,
        storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
        planner=MCoreSavePlanner(flatten_state_dict=False),
    )


def write_mcore_files(folder: Path) -> None:
    """metadata.json and an empty common.pt, with which mcore's own `load` recognises the folder. One rank calls it."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    torch.save({}, folder / "common.pt")


def first_line(error: BaseException) -> str:
    """OSError: [Errno 27] File too large"""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@torch.no_grad()
def read(state: Mapping[str, Any], folder: Path, metadata: Metadata) -> dict[str, Any]:
    """The nested dictionary with tensors in place of sharded tensors. All ranks call it.

    Plain pieces are read into the sharded tensors' own data; strided ones (gated weights) come back as new tensors.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: on every rank, when one cannot read.
    """
    pieces, nonpersistent, factories = load_preprocess(dict(state))
    assert not nonpersistent
    wanted: dict[str, list[ShardedTensor]] = defaultdict(list)
    for piece in nested_values(pieces):
        wanted[piece.key].append(piece)
    dcp.load(
        mcore_to_pyt_state_dict(wanted, True),
        storage_reader=_Reader(folder, metadata),
        planner=MCoreLoadPlanner(shapes_validation_sharded_tensors=[p for ps in wanted.values() for p in ps]),
    )
    dict_list_map_inplace(lambda piece: piece.data, pieces)
    return apply_factory_merges(pieces, factories)
