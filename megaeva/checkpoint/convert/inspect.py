"""`megaeva inspect`: what a file of weights or a checkpoint is, as far as it can be told without its code."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from megaeva.checkpoint import layout
from megaeva.checkpoint.convert import identify, ours
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import open_source
from megaeva.checkpoint.convert.run_folder import RunSource, run_contents
from megaeva.checkpoint.convert.streaming import Finite
from megaeva.checkpoint.tensors import TensorInfo, TensorSource
from megaeva.config.schema import ModelSection, TextSection, VisionSection
from megaeva.errors import CheckpointError

_PARTS = {
    "vision": "vision tower",
    "text": "text tower",
    "scale": "logit scale",
    "mask_token": "mask token",
    "lm_head": "lm_head",
}


def inspect(path: Path, *, model: ModelSection | str | None, tensors: bool, verify: bool) -> Iterator[str]:
    """Yields lines about a file, a folder or a run. Nothing but headers is read, unless `verify`.

    Args:
        model: what it is held against, in place of the configuration beside it or the published variants.
        tensors: list every tensor with shape and dtype.
        verify: read every tensor; those of a checkpoint against their checksums, optimizer state included.

    Raises:
        CheckpointError: it cannot be read, or `verify` finds damage or a number that is not finite.
    """
    source = open_source(path)
    try:
        yield f"{source.path}: {len(source.infos)} tensors, {_sizes(source.infos)}"
        if isinstance(source, RunSource):
            yield from _run(source)
        else:
            yield from _file(source, model)
        if tensors:
            width = max((len(name) for name in source.infos), default=0)
            for name, info in source.infos.items():
                yield f"  {name:{width}}  {_dtype(info)}  {list(info.shape)}"
        if verify:
            yield from _verified(source)
    finally:
        source.close()


def _file(source: TensorSource, model: ModelSection | str | None) -> Iterator[str]:
    try:
        form = identify.recognise(source)
    except CheckpointError as error:
        yield f"format: not known. {error}"
        return
    yield f"format: {form.name}, {form.title}"
    yield f"variants whose tensors these could be: {', '.join(identify.candidates(source, form)) or 'none published'}"
    yield f"configuration beside it: {_beside(source, form)}"
    try:
        what, notes = identify.settled(source, form, model)
        yield from notes
        infos = identify.in_ours(source, form, what).infos
    except CheckpointError as error:
        yield f"model: not settled. {error}"
        return
    yield from _model(what, infos)


def _beside(source: TensorSource, form: Format) -> str:
    try:
        return "none" if form.read_config(source.path) is None else "says which model it is"
    except CheckpointError as error:
        return f"cannot be used. {error}"


def _model(what: Contents, infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What the tensors are, in our terms."""
    held = {"clip": "both towers of a CLIP", "vision": "a vision tower", "mim": "a distilled vision tower without head"}
    yield f"holds: {held[what.kind]}" + (f", for a teacher of width {what.teacher_dim}" if what.teacher_dim else "")
    for part, title in _PARTS.items():
        inside = {name: info for name, info in infos.items() if name.partition(".")[0] == part}
        if inside:
            yield f"{title}: {_sizes(inside)}"
            if part == "vision":
                yield f"  {_vision(what.model.vision)}" + ("" if what.kind == "mim" else f", to {what.model.embed_dim}")
            elif part == "text":
                yield f"  {_text(what.model.text)}, to {what.model.embed_dim}"
    if what.clip_ids is not None:
        yield f"vocabulary: {len(what.clip_ids):,} of CLIP's tokens"
    image = what.preprocess
    yield (
        f"images: {image.resize}, {image.interpolation}, "
        f"mean {_three(image.mean)}, std {_three(image.std)}"
        + ("" if image.crop_share == 1.0 else f", the centre's {image.crop_share:g}")
    )
    missing = [name for name in ours.shapes(what) if name not in infos]
    if missing:
        yield f"missing: {', '.join(missing)}"


def _run(source: RunSource) -> Iterator[str]:
    info = layout.read_info(source.path)
    if info.get("task") is None:
        yield f"format: megaeva, converted from {info.get('source')}; starts runs (init.*), does not resume one"
    else:
        yield (
            f"format: megaeva, a checkpoint of a run: task {info['task']}, step {info.get('step')}, "
            f"{info.get('samples')} samples"
        )
        yield "grids: " + ", ".join(
            f"{tower} " + " x ".join(f"{axis}={size}" for axis, size in axes.items())
            for tower, axes in info.get("grids", {}).items()
        )
    yield "written by: " + ", ".join(f"{name} {number}" for name, number in info.get("versions", {}).items())
    state = {name: tensor for name, tensor in source.reader.infos.items() if name not in source.infos}
    if state:
        yield f"optimizer ({info.get('optimizer')}): {len(state)} tensors, {_sizes(state)}"
    yield "checksums: " + ("CRC-32 of every record; --verify reads them all" if source.reader.has_checksums else "none")
    what = run_contents(source.path, source.infos)
    yield from _model(what, source.infos)
    unexplained = [name for name in source.infos if name not in ours.shapes(what)]
    if unexplained:
        yield f"not explained: {', '.join(unexplained)}"


def _verified(source: TensorSource) -> Iterator[str]:
    finite = Finite(source.reader if isinstance(source, RunSource) else source)
    for name in finite.infos:
        finite.read(name)
    held = ", as their checksums say" if isinstance(source, RunSource) and source.reader.has_checksums else ""
    yield f"verified: {len(finite.infos)} tensors read, all finite{held}"


def _sizes(infos: Mapping[str, TensorInfo]) -> str:
    """1,234 parameters, fp16 1,200 and fp32 34, 2.4 MB"""
    by_dtype: dict[str, int] = {}
    for info in infos.values():
        numel = info.num_bytes // info.dtype.itemsize
        by_dtype[_dtype(info)] = by_dtype.get(_dtype(info), 0) + numel
    total, num_bytes = sum(by_dtype.values()), sum(info.num_bytes for info in infos.values())
    shares = " and ".join(dtype if len(by_dtype) == 1 else f"{dtype} {count:,}" for dtype, count in by_dtype.items())
    return f"{total:,} numbers, {shares or 'none'}, {num_bytes / 1e6:,.1f} MB"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _vision(cfg: VisionSection) -> str:
    flags = [
        f"{cfg.norm_position}-norm {cfg.norm}",
        cfg.activation,
        *(name for name, on in (("sub-LN", cfg.sub_ln_mlp), ("RoPE", cfg.rope), ("ln_pre", cfg.ln_pre)) if on),
    ]
    return (
        f"{cfg.image_size} px in patches of {cfg.patch_size}, {cfg.num_layers} layers of width {cfg.hidden_size}, "
        f"{cfg.num_heads} heads, MLP {cfg.ffn_hidden_size}; {', '.join(flags)}"
    )


def _text(cfg: TextSection) -> str:
    return (
        f"{cfg.context_length} tokens of {cfg.vocab_size:,}, {cfg.num_layers} layers of width {cfg.hidden_size}, "
        f"{cfg.num_heads} heads, MLP {cfg.ffn_hidden_size}; {cfg.activation}"
    )


def _three(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
