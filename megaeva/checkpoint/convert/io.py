"""Files of tensors by what they hold, not by their endings: `open_source` reads them, the sinks write them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import MAX_SHARD_BYTES
from megaeva.checkpoint.tensors import TensorInfo, TensorSource


def open_source(path: str | Path) -> TensorSource:
    """Opens a file or folder of tensors for reading.

    Raises:
        CheckpointError: there is none, it is damaged, or it would have to be unpickled with code.
    """
    raise NotImplementedError


class _Sink:
    def write(self, name: str, tensor: Tensor) -> None:
        """See `TensorSink.write`."""
        raise NotImplementedError

    def finish(self) -> None:
        """See `TensorSink.finish`."""
        raise NotImplementedError

    def abort(self) -> None:
        """See `TensorSink.abort`."""
        raise NotImplementedError


class TorchSink(_Sink):
    """A file that `torch.load(weights_only=True, mmap=True)` reads: a plain state dict."""

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], beside: Callable[[Path], None] | None = None
    ) -> None:
        """Args:
        path: of the file; must not exist.
        beside: writes the files that belong beside it into the hidden folder it is given. Called at once.
        """
        raise NotImplementedError


class SafetensorsSink(_Sink):
    """A folder of `{stem}.safetensors`, or of shards and `{stem}.safetensors.index.json`."""

    def __init__(
        self,
        folder: Path,
        infos: Mapping[str, TensorInfo],
        shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Args: as of `TorchSink`; `folder` must not exist."""
        raise NotImplementedError


class RunSink(_Sink):
    """A folder like a run's checkpoint, without optimizer."""

    def __init__(self, folder: Path, contents: Contents, infos: Mapping[str, TensorInfo]) -> None:
        raise NotImplementedError
