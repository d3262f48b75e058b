"""Files of tensors by what they hold, not by their endings: `open_source` reads them, the sinks write them."""

import json
from pathlib import Path

from megaeva.checkpoint import layout
from megaeva.checkpoint.convert.places import Place, PlacedTensors
from megaeva.checkpoint.convert.run_folder import RunSink, RunSource
from megaeva.checkpoint.convert.safetensors_file import SafetensorsSink, is_safetensors, safetensors_places
from megaeva.checkpoint.convert.torch_file import TorchSink, is_zip, refuse_old_pickle, torch_places
from megaeva.checkpoint.tensors import TensorSource
from megaeva.errors import CheckpointError

__all__ = ["RunSink", "SafetensorsSink", "TorchSink", "find_weights", "open_source"]

_INDEX = ".index.json"
_WEIGHTS = tuple(
    name + end
    for name in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
    for end in (_INDEX, "")
)
"""What Hugging Face, open_clip and timm look for in a folder, in this order."""


def open_source(path: str | Path, *, averaged: bool = False) -> TensorSource:
    """Opens a file or folder of tensors for reading; only headers are read.

    Args:
        path: zip file of torch.save or TorchScript, safetensors, index of shards, or a folder that holds one; a run's
            folder or one checkpoint of it, whose optimizer is left out.
        averaged: of a run, the averages of its weights in their place.

    Raises:
        CheckpointError: there is none, it is damaged, it would have to be unpickled with code, or it has no averages.
    """
    path = Path(path)
    if layout.is_run(path):
        return RunSource(path, averaged=averaged)
    if averaged:
        raise CheckpointError(
            f"{path} is no run, so it has no averaged weights; --ema needs the run folder of a training run; "
            "name it, or leave --ema out."
        )
    file = find_weights(path)
    try:
        return PlacedTensors(path, _shards(file) if file.name.endswith(_INDEX) else _file_places(file))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); it must be a readable file; check its permissions."
        ) from error


def find_weights(path: Path) -> Path:
    """The file of weights, or index of shards, meant by `path`: itself, or the one in a folder.

    Raises:
        CheckpointError: there is none, or a folder holds several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; it must be a file of weights, a folder of them or of a run; check the path."
        )
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin") and p.is_file())
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{path} holds "
        + (f"several files of weights ({', '.join(p.name for p in found[:8])})" if found else "no file of weights")
        + f"; a folder must hold one of {', '.join(_WEIGHTS)}, or a single .safetensors, .pt, .pth or .bin; "
        "name the file."
    )


def _file_places(file: Path) -> dict[str, Place]:
    if is_safetensors(file):
        return safetensors_places(file)
    if is_zip(file):
        return torch_places(file)
    with file.open("rb") as stream:
        start = stream.read(1)
    if start == b"\x80":
        refuse_old_pickle(file)
    raise CheckpointError(
        f"{file} ({file.stat().st_size} bytes) is no file of weights; it must be one that torch.save, torch.jit.save "
        "or safetensors wrote, an index of shards, or a run's folder; check that it was downloaded whole."
    )


def _shards(index: Path) -> dict[str, Place]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be used ({type(error).__name__}: {error}); it must be JSON with a `weight_map` of tensors "
            "to files; copy it again."
        ) from error
    missing = outside or [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {', '.join(missing[:8])}; {len(missing)} of {len(files)} shards are not in its folder; all "
            "must be beside it; copy them there."
        )
    places: dict[str, Place] = {}
    for file in files:
        for name, place in _file_places(index.parent / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{index.parent / file} holds {name}, which {index.name} places in {weight_map.get(name)}; both "
                    "must agree; copy shards and index again."
                )
            places[name] = place
    lost = [name for name in weight_map if name not in places]
    if lost:
        raise CheckpointError(
            f"{index} places {lost[0]} in {weight_map[lost[0]]}, which does not hold it ({len(lost)} tensors); both "
            "must agree; copy shards and index again."
        )
    return {name: places[name] for name in weight_map}
