"""One rank's share of the full-size model, built and run once in a world of fake processes.

PyTorch's fake process group sends nothing: what a rank gathers are copies of its own rows, what it reduces stays as it
is. So values mean nothing here; shapes, bytes, operators and seconds are those of the rank.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaeva.config.schema import Config, ModelSection, VisionSection
from megaeva.config.topology import grid_axes
from megaeva.errors import ConfigError, UserError
from megaeva.losses.contrastive import clip_loss, sigmoid_loss
from megaeva.losses.feature_distill import negative_cosine_share
from megaeva.model.fp8 import fp8_step
from megaeva.model.layer import Pass
from megaeva.model.mim_student import MIMStudent
from megaeva.model.recompute import set_recompute
from megaeva.model.sequence import gather_tokens
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.ops import attention, contrastive, layer_norm, native_devices, normalize_pack, swiglu
from megaeva.parallel.grid import build_grids
from megaeva.parallel.platform import DTYPES, apply_cpu_shim, gather_buffer
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.wrap import Tower, reduce_gradients, wrap
from megaeva.planning import formulae as f
from megaeva.planning.estimate import Plan, plan, stage_range
from megaeva.planning.gpus import GPUS
from megaeva.planning.meter import Allocations, Meter, Products16, allocations
from megaeva.planning.table import columns, in_bytes
from megaeva.planning.tower import Tower as PlannedTower

_OPERATORS: Any = [attention, contrastive, layer_norm, normalize_pack, swiglu]
_PYTHON_BYTES = f.GIB  # an interpreter with PyTorch and Megatron-core, and what operators take inside


@dataclass(frozen=True)
class Piece:
    """One pass of the rehearsal: what went in and came out, and what it took.

    Attributes:
        work_bytes: (predicted, measured) above the model's own: activations, gradients of them, buffers.
        flops: (predicted, measured) of matrix products; None where they are not counted.
    """

    name: str
    shapes: str
    parameters: int
    work_bytes: tuple[int, int]
    flops: tuple[int, int] | None


@dataclass
class Rehearsal:
    """What a rank's share took; `model_bytes` are (predicted, measured) of weights and gradients."""

    cfg: Config
    world_size: int
    rank: int
    meter: Meter
    places: list[str] = field(default_factory=list)
    model_bytes: tuple[int, int] = (0, 0)
    pieces: list[Piece] = field(default_factory=list)
    between_stages: int = 0  # bytes of a microbatch's hidden states
    resident: tuple[int, int] = (0, 0)  # of the process, before and at most
    notes: list[str] = field(default_factory=list)

    @property
    def meta(self) -> bool:
        """Whether it was without memory."""
        return self.meter.meta

    @property
    def peak(self) -> tuple[int, int]:
        """(predicted, measured) bytes at the worst moment."""
        predicted, measured = (max(piece.work_bytes[i] for piece in self.pieces) for i in range(2))
        return self.model_bytes[0] + predicted, self.model_bytes[1] + measured


def rehearse(
    cfg: Config, world_size: int, rank: int, teacher: ModelSection | None = None, *, meta: bool = False
) -> Rehearsal:
    """Build what `rank` of so many holds, and run a microbatch of each of its towers forward and backward, the loss of
    its rows, and the reduction of its gradients. Of a recipe with phases it is the first.

    `check_world` must hold; no process group may exist, and none is left. FP8 is rehearsed in bf16 unless
    train.fp8.rehearse. Not run: the optimizer, the transfers between stages, other microbatches.

    Args:
        teacher: of a MIM run; None: it is left out.
        meta: shapes only: no memory, no values. What operators take inside is then not measured.

    Raises:
        UserError: no such rank, or the machine's free memory is too small for it.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"--rank {rank} is not in a world of --gpus {world_size}; it must be 0 to {world_size - 1}; name one of "
            "those, or more --gpus."
        )
    in_bf16 = cfg.train.precision == "fp8" and (meta or not cfg.train.fp8.rehearse)
    if in_bf16:
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": "bf16"})})
    cpu = GPUS["a100-80"].model_copy(update={"transformer_engine": False})
    planned = plan(cfg, world_size, cpu, teacher)
    cfg = planned.steps[0].phase.cfg
    apply_cpu_shim()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        out = _Stage(cfg, planned, rank, meta).run()
    finally:
        dist.destroy_process_group()
    if in_bf16:
        out.notes.append("in bf16 in place of FP8, whose own copies of the weights are in neither figure")
    return out


class _Stage:
    def __init__(self, cfg: Config, planned: Plan, rank: int, meta: bool) -> None:
        self.cfg, self.meta = cfg, meta
        step = planned.steps[0]
        self.world = planned.num_gpus
        self.runtime = Runtime(rank, self.world, 0, torch.device("cpu"), "fake")
        self.grids = build_grids(grid_axes(cfg), self.runtime)
        vision = "vision" if cfg.task == "contrastive" else "student"
        found = {vision: step.vision, "text": step.text, "teacher": step.teacher}
        self.planned = {
            name: replace(one, microbatches=1, work=replace(one.work, gradient_copies=not meta))
            for name, one in found.items()
            if one is not None
        }
        self.dtype = DTYPES[cfg.train.parameter_precision]
        self.out = Rehearsal(cfg, self.world, rank, Meter(_attention_flops(), meta=meta))
        self.out.notes = [note for note in planned.notes if note.startswith("the teacher is not counted")]

    def run(self) -> Rehearsal:
        out, cfg = self.out, self.cfg
        self._predict_model()
        if not self.meta:
            self._require_memory()
        before = _resident()
        slow = not self.meta and self.dtype is torch.bfloat16 and Products16.helps()
        with (
            _own_gather_buffer(),
            _without_memory() if self.meta else nullcontext(),
            Products16() if slow else nullcontext(),
            out.meter,
        ):
            towers: dict[str, Tower] = {}
            built = self._measured(lambda: towers.update({name: self._tower(name) for name in self.planned}))
            out.model_bytes = (out.model_bytes[0], built.kept)
            trained = [tower for tower in towers.values() if tower.trained]
            with fp8_step(trained, cfg.train.fp8_in_use, "local"):
                for name, tower in towers.items():
                    self._pass(name, tower)
            if cfg.task == "contrastive":
                self._contrastive_loss()
            reduce_gradients(trained)
        out.resident = (before, _resident())
        return out

    # ----------------------------------------------------------------------------------------------------- building

    def _predict_model(self) -> None:
        total = 0
        for name, one in self.planned.items():
            grid = self.grids[name]
            count = one.parameters(grid.pp_rank)
            total += count * one.work.number + (f.gradient_bytes(count) if one.trained else 0)
            layers = stage_range(one.chunks[grid.pp_rank])
            place = f"tp {grid.tp_rank} of {grid.tp_size}, stage {grid.pp_rank} of {grid.pp_size} (layers {layers})"
            self.out.places.append(
                f"{name}: {place}, data rank {grid.dp_rank} of {grid.dp_size}; "
                f"{one.work.sequences} sequences of {one.work.tokens} tokens"
            )
        self.out.model_bytes = (total, 0)

    def _require_memory(self) -> None:
        work = max(self._work_bytes(name) for name in self.planned)
        if self.cfg.task == "contrastive":
            work = max(work, self._loss_bytes())
        needed, free = self.out.model_bytes[0] + work + _PYTHON_BYTES, _free_memory()
        if needed > free:
            raise UserError(
                f"rank {self.runtime.rank}'s share takes {in_bytes(needed)} here, and {in_bytes(free)} of this "
                "machine's memory are free; all of it must fit; add --meta for shapes, FLOPs and bytes without memory, "
                "or lower train.micro_batch_size, or cut the tower into more parts (parallel.vision.tp, pp)."
            )

    def _tower(self, name: str) -> Tower:
        cfg, grid = self.cfg, self.grids[name]
        shared: dict[str, Any] = {"grid": grid, "precision": cfg.train.parameter_precision}
        trained, one = self.planned[name].trained, self.planned[name]
        if trained:
            shared["fp8"] = cfg.train.fp8_in_use
        module: Any
        if name == "text":
            module = TextTower(cfg.model.text, cfg.model.embed_dim, **shared)
        elif name == "student":
            assert cfg.mim is not None
            share = cfg.mim.stop_grad_patch_embed
            module = MIMStudent(cfg.model.vision, one.out_dim, stop_grad_patch_embed=share, **shared)
        else:
            assert isinstance(one.section, VisionSection)
            module = VisionTower(one.section, one.out_dim, **shared)
        set_recompute(getattr(module, "vision", module), one.axes.recompute)
        module.train(trained).requires_grad_(trained)
        _fill(module)
        # Gradients are reduced at the end in any case; a parameter gather belongs to the optimizer's step.
        apart = cfg.parallel.model_copy(update={"overlap_grad_reduce": False, "overlap_param_gather": False})
        return wrap(name, module, grid, apart)

    # ------------------------------------------------------------------------------------------------------- passes

    def _pass(self, name: str, tower: Tower) -> None:
        one, grid = self.planned[name], self.grids[name]
        shapes = []
        target = torch.randn(one.out_rows * one.work.sequences, one.out_dim, dtype=self.dtype)  # of a student

        def work() -> None:
            for chunk in range(grid.vpp_size):
                given, forward = self._forward(name, tower, chunk)
                result = forward()
                shapes.append(f"{_shape(given)} -> {_shape(result)}")
                if tower.trained:
                    if name == "student" and tower.module.vision.blocks.is_last(chunk):
                        result = negative_cosine_share(result, target, float(len(result)))
                    result.backward(torch.ones_like(result))

        predicted = one.rank_flops(grid.pp_rank)
        before = self.out.meter.flops
        used = self._measured(work).peak
        measured = None if one.fp8 else (predicted, self.out.meter.flops - before)
        count = sum(parameter.numel() for parameter in tower.module.parameters())
        self.out.pieces.append(Piece(name, "; ".join(shapes), count, (self._work_bytes(name), used), measured))

    def _forward(self, name: str, tower: Tower, chunk: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """(what goes in, the pass) of one of the rank's virtual stages."""
        one, module = self.planned[name], tower.module
        size, tokens, section = one.work.sequences, one.work.tokens, one.section
        if name == "text":
            ids = torch.randint(1, section.vocab_size, (size, tokens))  # type: ignore[union-attr]
            return ids, lambda: module.encode(ids, torch.full((size,), tokens - 1), tokens)
        assert isinstance(section, VisionSection)
        vision: VisionTower = getattr(module, "vision", module)
        hidden = image = None
        if vision.blocks.is_first(chunk):
            # In the tower's dtype: what of it is a copy, the tower's own, and what the batch's, is no question then.
            image = torch.randn(size, 3, section.image_size, section.image_size, dtype=self.dtype)
        else:
            rows = one.work.own_rows // size
            hidden = torch.randn(rows, size, section.hidden_size, dtype=self.dtype).requires_grad_(one.trained)
            self.out.between_stages = hidden.numel() * hidden.element_size()
        given = image if image is not None else hidden
        assert given is not None
        if name == "teacher":

            def targets() -> Tensor:
                with torch.no_grad():
                    return vision.project(vision.tokens(given)[:, 1:])

            return given, targets
        if name == "student":
            return given, lambda: self._student(module, image, hidden, chunk)
        keep = None
        if tokens - 1 < section.num_patches:
            keep = torch.arange(tokens - 1).expand(size, -1)
        return given, lambda: tower.ddp(image, keep, hidden=hidden, chunk=chunk)

    def _student(self, student: MIMStudent, image: Tensor | None, hidden: Tensor | None, chunk: int) -> Tensor:
        """As MIMStudent.forward, but rows are picked by their number: fake tensors know no values of a mask."""
        assert self.cfg.mim is not None
        vision, number = student.vision, self.cfg.mim.mask.num_masked
        size = (image if image is not None else hidden).shape[0 if image is not None else 1]  # type: ignore[union-attr]
        if image is not None:
            mask_BN = (torch.arange(vision.cfg.num_patches) < number).expand(size, -1)
            hidden = vision.start(student._masked(vision.embed(image), mask_BN))
        assert hidden is not None
        hidden = vision.run_blocks(hidden, chunk=chunk)
        if not vision.blocks.is_last(chunk):
            return hidden
        token_SBD = gather_tokens(hidden, vision.num_tokens(None), vision.grid)
        picked = token_SBD[1:].transpose(0, 1)[:, :number].flatten(0, 1)
        predicted: Tensor = student.lm_head(vision.norm(picked))
        return predicted

    def _contrastive_loss(self) -> None:
        cfg = self.cfg
        rows, width = cfg.train.global_batch_size // self.world, cfg.model.embed_dim
        group = self.grids["scale"].groups.dp

        def work() -> None:
            image, text = (torch.randn(rows, width, dtype=self.dtype).requires_grad_() for _ in range(2))
            scale = torch.full((), cfg.model.logit_scale.init).requires_grad_()
            if cfg.loss.name == "sigmoid":
                loss = sigmoid_loss(image, text, scale, torch.full((), -10.0).requires_grad_(), group=group)
            else:
                loss = clip_loss(image, text, scale, group=group, label_smoothing=cfg.loss.label_smoothing)
            loss.backward()

        used = self._measured(work).peak
        shapes = f"2 x [{rows}, {width}] of {cfg.train.global_batch_size:,} pairs"
        self.out.pieces.append(Piece("loss", shapes, 0, (self._loss_bytes(), used), None))

    def _measured(self, work: Callable[[], None]) -> Allocations:
        """What `work` took and left. Each pass gathers into a buffer of its own."""
        gather_buffer().buffer = {}
        if not self.meta:
            with allocations() as found:
                work()
            return found
        meter = self.out.meter
        meter.peak = before = meter.live
        work()
        return Allocations(meter.live - before, meter.peak - before)

    # --------------------------------------------------------------------------------------------------- prediction

    def _work_bytes(self, name: str) -> int:
        one: PlannedTower = self.planned[name]
        rank = self.grids[name].pp_rank
        if not one.trained:
            return one.forward_work
        return one.backward_peak(rank) + one.gathered

    def _loss_bytes(self) -> int:
        batch, width = self.cfg.train.global_batch_size, self.cfg.model.embed_dim
        rows, number = batch // self.world, self.planned["vision"].work.number
        # Both towers' features, whose gradients come when the tile is gone.
        return f.feature_bytes(rows, width, number) + f.loss_bytes(rows, batch, width, number, on_cpu=True)


def rehearsal_lines(one: Rehearsal) -> list[str]:
    """The rehearsal as lines."""
    how = "on the meta device: shapes only" if one.meta else "on this CPU"
    lines = [f"rank {one.rank} of {one.world_size}, {one.cfg.train.precision}, {how}", *one.places, ""]
    rows: list[tuple[str, ...]] = [
        ("pass", "parameters", "FLOPs predicted", "measured", "work predicted", "measured", "shapes")
    ]
    for piece in one.pieces:
        flops = ("-", "-") if piece.flops is None else tuple(f"{number:.4g}" for number in piece.flops)
        work = tuple(in_bytes(number) for number in piece.work_bytes)
        rows.append((piece.name, f"{piece.parameters:,}", *flops, *work, piece.shapes))
    lines += [*columns(rows, right=(1, 2, 3, 4, 5)), ""]
    for title, (predicted, measured) in (("weights and gradients", one.model_bytes), ("at most", one.peak)):
        error = 100 * (predicted / measured - 1)
        lines.append(f"{title}: predicted {in_bytes(predicted)}, measured {in_bytes(measured)} ({error:+.1f} %)")
    if not one.meta:
        start, most = (in_bytes(number) for number in one.resident)
        lines.append(f"resident memory of this process: {start} before the towers, at most {most}")
    table: list[tuple[str, ...]] = [("collective", "ranks", "calls", "sent")]
    table += [(name, str(n), f"{one.meter.calls[name, n]:,}", in_bytes(sent)) for (name, n), sent in _sorted(one)]
    lines += ["", *(columns(table, right=(1, 2, 3)) if len(table) > 1 else ["no collectives"])]
    if one.between_stages:
        lines.append(f"between stages: {in_bytes(one.between_stages)} of a microbatch each way, not sent here")
    lines.append("note: nothing is sent; what is gathered are copies of this rank's own, so values mean nothing")
    lines.append("note: not run: the optimizer, and the other microbatches of a step")
    if one.meta:
        lines.append("note: the inside of operators is not seen without memory: the loss's tile is predicted only")
    return lines + [f"note: {note}" for note in one.notes]


def _sorted(one: Rehearsal) -> list[tuple[tuple[str, int], int]]:
    return sorted(one.meter.sent.items())


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Some finite weights: `init_weights` would draw each tensor of all ranks."""
    for name, parameter in module.named_parameters():
        parameter.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.normal_(0.0, 0.02)


@contextmanager
def _own_gather_buffer() -> Iterator[None]:
    """Megatron-core's buffer of gathered sequences is another one meanwhile: it outlives a rehearsal."""
    buffer = gather_buffer()
    kept = buffer.buffer
    try:
        yield
    finally:
        buffer.buffer = kept


@contextmanager
def _without_memory() -> Iterator[None]:
    """What tensors of the meta device need: the native operators that a CPU has, whose shapes are known, and no
    generators, of which there are none there; no layer here draws from Megatron-core's, which compares their states.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker  # at the top it would precede parallel.platform

    tracker = get_cuda_rng_tracker()
    devices = [module._NATIVE_DEVICES for module in _OPERATORS]
    tracker.fork = lambda *_: nullcontext()
    draw, Pass.generator = Pass.generator, lambda *_: None  # type: ignore[method-assign, assignment]
    for module in _OPERATORS:
        module._NATIVE_DEVICES |= {"meta"} if "cpu" in module._NATIVE_DEVICES else set()
    try:
        yield
    finally:
        del tracker.fork
        Pass.generator = draw  # type: ignore[method-assign]
        for module, found in zip(_OPERATORS, devices, strict=True):
            module._NATIVE_DEVICES = found


def _attention_flops() -> dict[Any, Any]:
    """Of this project's own operator, which PyTorch cannot know: 4 S^2 w forward, twice that backward.

    FlopCounterMode's convention, whose count of the operator's plain definition it is: a causal mask saves nothing, and
    what the backward pass computes again of the forward one does not count.
    """
    if "cpu" not in native_devices("attention"):
        return {}

    def forward(qkv: Any, *_: Any, **__: Any) -> int:
        length, batch, features = qkv
        return int(4 * length * length * batch * features // 3)

    def backward(grad: Any, qkv: Any, *_: Any, **__: Any) -> int:
        return 2 * forward(qkv)

    return {torch.ops.megaeva.attention: forward, torch.ops.megaeva.attention_backward: backward}


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_memory() -> int:
    """Bytes that Linux says a new process can have."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
