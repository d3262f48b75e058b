"""Each tower as an ONNX graph of standard operators, run once by onnxruntime before it gets its name.

The towers' own operators are replaced by their plain-PyTorch references after tracing: training code knows nothing of
it. Unlike a conversion this does not stream: of a tower in fp32, four copies are in memory at the worst moment.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.destination import Destination
from megaeva.checkpoint.convert.hf_config import write_tokenizer
from megaeva.checkpoint.convert.sidecar import contents_info
from megaeva.checkpoint.convert.vocabulary import CLIP_VOCABULARY, embedding_rows, exported_text
from megaeva.checkpoint.tensors import TensorInfo, TensorSource
from megaeva.errors import CheckpointError, UserError
from megaeva.export.towers import build_text, build_vision
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.ops import attention, layer_norm, native_devices, swiglu

TOLERANCE = 1e-4
INFO_NAME = "megaeva_onnx.json"
_TOKENS = "token_embedding.weight"


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime is from our tower on one batch.

    Attributes:
        difference: largest absolute one.
        largest: largest absolute output.
    """

    tower: str
    difference: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.tower}: onnxruntime and megaeva differ by {self.difference:.1e} at most, "
            f"outputs are up to {self.largest:.3g}"
        )


def write_onnx(source: TensorSource, what: Contents, destination: Path) -> list[str]:
    """Writes vision.onnx, of a clip text.onnx too, and beside them what a caller must know; a line for each tower.

    Inputs are image [batch, 3, H, W] fp32, normalised, and token [batch, L] int64, padded with 0; the outputs
    image_embedding and text_embedding [batch, E], not normalised, and of kind mim `tokens` [batch, 1 + N, D] after the
    last norm.

    Args:
        source: in our names.
        destination: a folder that does not exist yet.

    Raises:
        UserError: the extra `export` is not installed.
        CheckpointError: the destination exists, or onnxruntime gives other outputs.
        OSError: the disk.
    """
    _require_packages()
    target = Destination(destination)
    try:
        parities = [_write_vision(target.folder, source, what)]
        if what.kind == "clip":
            parities.append(_write_text(target.folder, source, what))
        _write_info(target.folder, source, what)
        for parity in parities:
            if not parity.difference <= TOLERANCE * max(1.0, parity.largest):
                raise CheckpointError(
                    f"{destination}: {parity}; they must agree to {TOLERANCE:.0e} of it; nothing was written, "
                    "report this with the versions that `megaeva doctor` prints."
                )
        target.publish_folder()
    except BaseException:
        target.remove()
        raise
    return [str(parity) for parity in parities]


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; --to onnx needs onnx, onnxscript and onnxruntime; "
            "run: pip install -e '.[export]'"
        ) from None


def _write_vision(folder: Path, source: TensorSource, what: Contents) -> Parity:
    tower = build_vision(source, what)
    size = what.model.vision.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    output = "tokens" if tower.head is None else "image_embedding"
    return _write(folder / "vision.onnx", _Vision(tower), images, "image", output)


def _write_text(folder: Path, source: TensorSource, what: Contents) -> Parity:
    whole = exported_text(what)
    if what.clip_ids is not None:
        source = _WholeVocabulary(source, what)
        what = Contents("clip", what.model.model_copy(update={"text": whole}))
    tower = build_text(source, what)
    # Ends at different places; what stands behind an end must not matter.
    tokens = torch.randint(whole.vocab_size - 1, (3, whole.context_length), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((whole.context_length - 1, 1, whole.context_length // 2)):
        tokens[row, end] = whole.vocab_size - 1
    return _write(folder / "text.onnx", _Text(tower), tokens, "token", "text_embedding")


def _write(path: Path, tower: nn.Module, batch: Tensor, name: str, output: str) -> Parity:
    """Traces a tower on two of the three rows of `batch`, and compares on all: the batch is dynamic."""
    import onnxruntime

    dynamic = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        traced = torch.export.export(tower, (batch[:2],), dynamic_shapes=dynamic).run_decompositions(_references())
        program = torch.onnx.export(
            traced, (), dynamo=True, input_names=[name], output_names=[output], dynamic_shapes=dynamic, verbose=False
        )
        assert program is not None
        program.save(path)  # above 2 GB the weights stand in a second file beside it
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        theirs = torch.from_numpy(session.run([output], {name: batch.numpy()})[0])
        ours = tower(batch)
    return Parity(path.stem, (theirs - ours).abs().max().item(), ours.abs().max().item())


class _Vision(nn.Module):
    """What vision.onnx computes."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.tower.tokens(image) if self.tower.head is None else self.tower(image)
        return out


class _Text(nn.Module):
    """What text.onnx computes: all places, where the tower's own forward reads the batch to stop at its last end."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, token: Tensor) -> Tensor:
        return self.tower.encode(token, token.argmax(-1), self.tower.cfg.context_length)


def _references() -> dict[Any, Callable[..., Any]]:
    """Our native operators' schemas by their plain-PyTorch definitions; the outputs that backward needs are empty."""

    def plain_attention(qkv_SBX: Tensor, cos_sin: Tensor | None, num_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
        angles = None if cos_sin is None else cos_sin.unsqueeze(3)
        return attention.reference(qkv_SBX, num_heads, cos_sin=angles, causal=causal), qkv_SBX.new_empty(0)

    def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm.reference(x, weight, bias, epsilon), x.new_empty(0), x.new_empty(0)

    if not native_devices():
        return {}
    return {
        torch.ops.megaeva.attention.default: plain_attention,
        torch.ops.megaeva.layer_norm.default: plain_layer_norm,
        torch.ops.megaeva.swiglu.default: swiglu.reference,
    }


class _WholeVocabulary:
    """The source with the token embedding of all of CLIP's ids (a `TensorSource`)."""

    def __init__(self, source: TensorSource, what: Contents) -> None:
        self.path, self._source, self._rows = source.path, source, embedding_rows(what)
        shown = dict(source.infos)
        shown["text." + _TOKENS] = TensorInfo(
            (CLIP_VOCABULARY, shown["text." + _TOKENS].shape[1]), shown["text." + _TOKENS].dtype
        )
        self.infos: Mapping[str, TensorInfo] = shown

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return self._rows.to_theirs(tensor)[0] if name == "text." + _TOKENS else tensor

    def close(self) -> None:
        self._source.close()


def _write_info(folder: Path, source: TensorSource, what: Contents) -> None:
    """How images and captions become inputs, and embeddings a similarity."""
    info = contents_info(what) | {"clip_ids": None, "normalized": False}
    if what.kind == "clip":
        text = exported_text(what)
        info["model"] |= {"text": text.model_dump(mode="json")}
        info["logit_scale"] = source.read("scale.log_scale").float().exp().item()
        if "scale.logit_bias" in source.infos:
            info["logit_bias"] = source.read("scale.logit_bias").float().item()
        if text.vocab_size == CLIP_VOCABULARY:
            write_tokenizer(folder, text)
    (folder / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
