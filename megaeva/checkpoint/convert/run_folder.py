"""A run's checkpoints as a source of weights, and weights as a checkpoint from which a run can start."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from megaeva.checkpoint import layout
from megaeva.checkpoint.average import checkpoint_reader
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.destination import Destination
from megaeva.checkpoint.convert.sidecar import contents_info, info_contents
from megaeva.checkpoint.record import DTYPES
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.checkpoint.torch_dist import FileWriter, write_index
from megaeva.errors import CheckpointError


def run_contents(checkpoint: Path, infos: Mapping[str, TensorInfo] | None = None) -> Contents:
    """What a checkpoint holds. CheckpointError: its megaeva.json is missing or damaged.

    Args:
        infos: its tensors, which say how wide the teacher was where megaeva.json does not.
    """
    info = layout.read_info(checkpoint)
    what = info_contents(checkpoint, info)
    if info["format"] == layout.OLDEST_FORMAT and infos and "lm_head.bias" in infos:
        what = replace(what, teacher_dim=infos["lm_head.bias"].shape[0])
    return what


class RunSource:
    """The weights of a checkpoint, without optimizer, or their averages; of a run, of its newest. A `TensorSource`.

    Attributes:
        reader: of all that the checkpoint holds.
    """

    def __init__(self, path: Path, *, averaged: bool = False) -> None:
        """Raises:
        CheckpointError: no finished checkpoint there, a damaged one, or one without averages.
        """
        self.path = layout.find_checkpoint(path)
        self.reader = checkpoint_reader(self.path, averaged=averaged)
        self.infos: Mapping[str, TensorInfo] = self.reader.weights

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        return self.reader.read(name)

    def close(self) -> None:
        """See `TensorSource.close`."""
        self.reader.close()


class RunSink:
    """A folder like a run's checkpoint, without optimizer: for init.clip, init.vision, init.text and evaluation."""

    def __init__(self, folder: Path, contents: Contents, infos: Mapping[str, TensorInfo]) -> None:
        """Args:
        folder: must not exist.
        contents: for megaeva.json.
        infos: in our names.

        Raises:
            CheckpointError: the destination exists, or a tensor has a dtype that no run has.
            OSError: the disk.
        """
        wrong = [f"{name} is {info.dtype}" for name, info in infos.items() if info.dtype not in DTYPES]
        if wrong:
            raise CheckpointError(
                f"{contents.source}: {', '.join(wrong[:8])}; weights of a run must be one of "
                f"{', '.join(sorted(map(str, DTYPES)))}; cast them before converting."
            )
        self._destination = Destination(folder)
        self._contents = contents
        self._left = dict(infos)
        try:
            self._file = FileWriter(self._destination.folder, 0)
        except BaseException:
            self._destination.remove()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """See `TensorSink.write`."""
        info = self._left.pop(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{name} is not as announced"
        self._file.write(name, info.shape, (0,) * len(info.shape), tensor)

    def finish(self) -> None:
        """See `TensorSink.finish`."""
        assert not self._left, f"not written: {list(self._left)}"
        folder = self._destination.folder
        write_index(folder, [self._file.close()])
        info = {
            "format": layout.FORMAT,
            "step": 0,
            "samples": 0,
            **contents_info(self._contents),
            "source": None if self._contents.source is None else str(self._contents.source),
            "versions": {name: version(name) for name in ("megaeva", "torch")},
        }
        layout.write_durably(folder / layout.INFO_NAME, layout.info_text(info))
        self._destination.publish_folder()

    def abort(self) -> None:
        """See `TensorSink.abort`."""
        self._file.abort()
        self._destination.remove()
