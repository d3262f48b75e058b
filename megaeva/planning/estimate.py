"""A recipe on a cluster: bytes of each pipeline stage and seconds of a step, put together from `formulae`. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megaeva.config.phases import Phase, run_phases
from megaeva.config.schema import AxesSection, Config, ModelSection, TextSection, VisionSection
from megaeva.config.topology import data_ranks, microbatches, num_kept, sharing_ranks
from megaeva.planning import formulae as f
from megaeva.planning.formulae import Work
from megaeva.planning.gpus import Gpu
from megaeva.planning.tower import Tower

PARTS = (
    "weights", "FP8 copies", "gradients", "optimizer", "teacher", "images", "activations", "loss, features",
    "communication", "margin",
)  # fmt: skip


@dataclass(frozen=True)
class StageBytes:
    """What each rank of a pipeline stage holds at its worst moment.

    Attributes:
        layers: of the vision tower, one range for each virtual stage.
        parts: bytes by the names of `PARTS`.
        moment: of the step, when it is most.
    """

    stage: int
    layers: tuple[range, ...]
    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class PhaseSeconds:
    """One step of a phase.

    Attributes:
        parts: seconds by what they are spent on, on a rank of the slowest stage.
        model_flops: of the model on a step's samples, forward and backward once.
        executed_flops: those and what is computed again.
    """

    phase: Phase
    parts: dict[str, float]
    model_flops: float
    executed_flops: float

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs."""
        return self.phase.cfg.train.global_batch_size / self.step


@dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    cfg: Config
    num_gpus: int
    gpu: Gpu
    steps: tuple["_Step", ...]

    @cached_property
    def stages(self) -> tuple[StageBytes, ...]:
        """Of each pipeline stage, in the phase in which it holds most."""
        return tuple(map(self._stage, range(self.cfg.parallel.vision.pp)))

    def _stage(self, stage: int) -> StageBytes:
        return max((step.stage_bytes(stage) for step in self.steps), key=lambda one: one.total)

    @cached_property
    def phases(self) -> tuple[PhaseSeconds, ...]:
        """A step of each phase."""
        return tuple(step.seconds() for step in self.steps)

    @property
    def host_bytes(self) -> int:
        """Of a rank's copy of what it saves, in the host's memory; 0 where saves are not asynchronous."""
        return self.steps[0].host_bytes

    @property
    def host_image_bytes(self) -> int:
        """Of decoded batches of a rank in the host's memory; 0 where the GPU decodes."""
        return max(step.images.host_bytes for step in self.steps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is taken for granted."""
        return self.steps[0].notes

    @cached_property
    def worst(self) -> StageBytes:
        """The stage that holds most.

        Of stages between the ends with as many layers the first is it: its warm-up is the longest.
        """
        chunks = self.steps[0].vision.chunks
        inner = {tuple(map(len, chunks[stage])): stage for stage in range(len(chunks) - 2, 0, -1)}
        return max(map(self._stage, sorted({0, *inner.values(), len(chunks) - 1})), key=lambda one: one.total)

    @property
    def capacity(self) -> int:
        """Bytes of the GPU."""
        return int(self.gpu.memory_gib * f.GIB)

    @property
    def fits(self) -> bool:
        """Whether every stage fits, margin included."""
        return self.worst.total <= self.capacity

    @property
    def days(self) -> float:
        """Of the whole run."""
        return sum(one.phase.steps * one.step for one in self.phases) / 86400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.num_gpus

    @property
    def samples_per_second(self) -> float:
        """Mean over the run, all GPUs."""
        return sum(one.phase.samples for one in self.phases) / (self.days * 86400)

    @property
    def mfu(self) -> float:
        """Model FLOPs of the run / (its seconds x GPUs x the peak of its parameters' precision: bf16's in FP8)."""
        peak = self.gpu.peak_tflops[self.cfg.train.parameter_precision] * 1e12
        flops = sum(one.model_flops * one.phase.steps for one in self.phases)
        return flops / (self.days * 86400 * self.num_gpus * peak)


def plan(cfg: Config, num_gpus: int, gpu: Gpu, teacher: ModelSection | None = None) -> Plan:
    """What the recipe takes on so many GPUs, one process on each.

    The rules of the recipe and `check_world` must hold. Captions are taken at their full context length, an upper
    bound: the batch's longest counts.

    Args:
        teacher: of a MIM run; None: it is left out, and a note says so.
    """
    return Plan(cfg, num_gpus, gpu, tuple(_Step(phase, num_gpus, gpu, teacher) for phase in run_phases(cfg)))


@dataclass(frozen=True)
class _Images:
    """Decoded images of a rank.

    Attributes:
        number: that it decodes for a step, those of its whole data block.
        on_gpu: by DALI.
        held: bytes on the GPU beside a step's work.
        dali: bytes of DALI's own output there.
        host_bytes: in the host's memory.
        seconds: that decoding takes.
        hidden: behind the step.
    """

    number: int
    on_gpu: bool
    held: int
    dali: int
    host_bytes: int
    seconds: float
    hidden: bool


def _images(cfg: Config, num_gpus: int, gpu: Gpu) -> _Images:
    """As data/loader.py has them. With data.decoder=auto DALI is taken to be installed. Of a CPU no bytes: there they
    are the loader's, and its device has no memory of its own."""
    data, vision = cfg.data, cfg.model.vision
    number = cfg.train.global_batch_size * sharing_ranks(cfg) // num_gpus * data.frames
    threads = data.decoder != "pillow"  # also of videos, which no GPU decodes
    on_gpu = threads and data.frames == 1
    batch = f.image_bytes(vision, number)
    held = batch * f.batches_held(data.num_workers, on_gpu, threads)
    seconds = f.decoding_seconds(gpu, number, data.num_workers, on_gpu)
    if not gpu.transformer_engine:
        return _Images(number, False, 0, 0, 0, seconds, data.num_workers > 0)
    host = 0 if on_gpu else held
    return _Images(number, on_gpu, held if on_gpu else 0, batch if on_gpu else 0, host, seconds, data.num_workers > 0)


class _Step:
    """A step of one phase."""

    def __init__(self, phase: Phase, num_gpus: int, gpu: Gpu, teacher: ModelSection | None) -> None:
        self.phase, self.num_gpus, self.gpu = phase, num_gpus, gpu
        cfg = self.cfg = phase.cfg
        vision, axes = cfg.model.vision, cfg.parallel
        self.contrastive = cfg.task == "contrastive"
        tokens = 1 + num_kept(vision.num_patches, vision.patch_dropout)
        self.text = self.teacher = None
        notes = []
        if self.contrastive:
            frozen = cfg.optim.frozen
            self.vision = self._tower(
                "vision", vision, axes.vision, cfg.model.embed_dim, tokens, "vision" not in frozen
            )
            text = cfg.model.text
            self.text = self._tower(
                "text", text, axes.text, cfg.model.embed_dim, text.context_length, "text" not in frozen
            )
            notes.append(f"captions are taken at {text.context_length} tokens; shorter batches cost less")
        else:
            assert cfg.mim is not None, "config.validate requires it for this task"
            width = cfg.model.embed_dim if teacher is None else teacher.embed_dim
            self.masked = cfg.mim.mask.num_masked
            student = self._tower("student", vision, axes.vision, width, tokens, True)
            self.vision = replace(student, out_rows=self.masked, head_bias=True, extra_first=vision.hidden_size)
            if teacher is None:
                notes.append(
                    "the teacher is not counted: its checkpoint is not there; say what it is with --teacher NAME"
                )
            else:
                patches = teacher.vision.num_patches
                one = self._tower("teacher", teacher.vision, axes.teacher, teacher.embed_dim, 1 + patches, False)
                self.teacher = replace(one, out_rows=patches)
        images = self.images = _images(cfg, num_gpus, gpu)
        how = "by DALI (assumed)" if images.on_gpu else "in its workers (measured on a CPU)"
        notes.append(
            f"each GPU decodes {images.number:,} images a step, {images.number / images.seconds:,.0f} a second {how}, "
            + ("behind it" if images.hidden else "before it")
        )
        self.notes = tuple(notes)

    def _tower(
        self,
        name: str,
        section: VisionSection | TextSection,
        axes: AxesSection,
        out_dim: int,
        tokens: int,
        trained: bool,
    ) -> Tower:
        cfg = self.cfg
        frames = cfg.data.frames if name == "vision" else 1
        size, passes = microbatches(cfg, axes, self.num_gpus, frames)
        sp = axes.sequence_parallel and axes.tp > 1
        precision = cfg.train.precision if trained else cfg.train.parameter_precision
        work = Work(tokens, size * frames, axes.tp, sp, precision, self.gpu.transformer_engine)
        bias = isinstance(section, VisionSection) and section.head_bias
        return Tower(name, section, axes, out_dim, 1, bias, trained, work, passes, cfg.train.fp8_in_use)

    @property
    def _trained(self) -> list[Tower]:
        return [tower for tower in (self.vision, self.text) if tower is not None and tower.trained]

    def _shards(self, tower: Tower) -> int:
        return data_ranks(tower.axes, self.num_gpus) if self.cfg.parallel.distributed_optimizer else 1

    # -------------------------------------------------------------------------------------------------------- bytes

    def stage_bytes(self, stage: int) -> StageBytes:
        """Of a rank of this pipeline stage."""
        cfg, number = self.cfg, self.vision.work.number
        parts = dict.fromkeys(PARTS, 0)
        for tower in (self.vision, self.text):
            if tower is None:
                continue
            rank = stage if tower is self.vision else 0
            count = tower.parameters(rank)
            parts["weights"] += count * number
            parts["FP8 copies"] += tower.fp8_bytes(rank)
            if tower.trained:
                parts["gradients"] += f.gradient_bytes(count)
                average = cfg.optim.ema_decay is not None
                parts["optimizer"] += f.optimizer_bytes(count, cfg.train.precision, self._shards(tower), average)
            parts["communication"] = max(parts["communication"], tower.gathered)
        if self.teacher is not None:
            parts["teacher"] = self.teacher.parameters(0) * number
        parts["images"] = self.images.held
        moment, activations, loss = max(self._moments(stage), key=lambda one: one[1] + one[2])
        parts["activations"], parts["loss, features"] = activations, loss
        reserved = int(self.gpu.reserved_gib * f.GIB) + self.images.dali
        parts["margin"] = reserved + int(self.gpu.fragmentation * (activations + loss))
        return StageBytes(stage, self.vision.chunks[stage], parts, moment)

    def _moments(self, stage: int) -> Iterator[tuple[str, int, int]]:
        """(name, activations, loss) of the moments that may be the worst, in the order of a step."""
        number, vision, text = self.vision.work.number, self.vision, self.text
        kept = vision.kept_on(stage)
        backward = kept + vision.backward_work(stage)
        if not self.contrastive:
            # Of the whole data block; joined from parts of microbatches, or gathered from ranks that share the block.
            targets = self.masked * self.images.number * vision.out_dim * number
            if self.teacher is not None:
                work = self.teacher.forward_work + self._sent_pixels(self.teacher)
                yield "the teacher's pass", max(work, targets), targets
            yield "backward of the student", backward, targets
            return
        assert text is not None
        cfg = self.cfg
        embed, batch = cfg.model.embed_dim, cfg.train.global_batch_size
        samples = batch // data_ranks(vision.axes, self.num_gpus)
        texts = batch // data_ranks(text.axes, self.num_gpus)
        features = f.feature_bytes(samples, embed, number) + f.feature_bytes(texts, embed, number)
        # Graphs that a tower in one pass keeps from its forward to its backward pass.
        text_graph = text.kept[0] if text.one_pass else 0
        graph = kept if vision.one_pass else 0
        forward = max(graph, vision.forward_work + self._sent_pixels(vision))
        if vision.axes.pp > 1:
            forward += 2 * f.layer_input_bytes(vision.section, vision.work)
        yield "the first pass of vision", text_graph + forward, features
        local = batch // self.num_gpus
        yield (
            "the loss",
            text_graph + graph,
            features + f.loss_bytes(local, batch, embed, number, not self.gpu.transformer_engine),
        )
        if text.trained:
            yield "backward of text", text.backward_peak(0) + graph, features
        if vision.trained:
            yield "backward of vision", backward, features

    def _sent_pixels(self, tower: Tower) -> int:
        """fp32 pixels of a microbatch that came from the host, there while the tower goes forward from its own copy."""
        if not self.images.host_bytes or tower.work.number == 4 or not isinstance(tower.section, VisionSection):
            return 0
        return f.image_bytes(tower.section, tower.work.sequences)

    @property
    def host_bytes(self) -> int:
        """A rank's copy of what it saves, in the host's memory: optimizer state, and its share of the weights."""
        total = 0
        for tower in self._trained:
            count, shards = tower.parameters(0), data_ranks(tower.axes, self.num_gpus)
            average = self.cfg.optim.ema_decay is not None
            total += f.optimizer_bytes(count, self.cfg.train.precision, self._shards(tower), average)
            total += -(-count * tower.work.number // shards)
        return total if self.cfg.save.asynchronous else 0

    # ------------------------------------------------------------------------------------------------------ seconds

    def seconds(self) -> PhaseSeconds:
        """Of one step."""
        parts: dict[str, float] = {}

        def add(name: str, value: float) -> None:
            parts[name] = parts.get(name, 0.0) + value

        executed = 0.0
        hidden: dict[str, tuple[float, float]] = {}  # of each tower, what its transfers can be behind
        for tower in filter(None, (self.teacher, self.text, self.vision)):
            forward, backward, again = tower.stage_seconds(self.gpu)
            m, axes = tower.microbatches, tower.axes
            first = 0 if tower.one_pass or (not self.contrastive and tower.trained) else 1
            passes = [(forward, 1)] * first + ([(forward + backward + again, 2)] if tower.trained else [])
            for times, transfers in passes:
                add(f"{tower.name} matmul", m * times.matmul)
                add(f"{tower.name} attention", m * times.attention)
                add(f"{tower.name} memory-bound", m * times.memory)
                add(f"{tower.name} tp transfers", m * times.tp)
                if axes.pp > 1:
                    sent = transfers * self._stage_transfer(tower)
                    stage = times.total + (sent if axes.vpp == 1 else 0.0)
                    if axes.vpp == 1:
                        add("pipeline transfers", m * sent)
                    add("pipeline bubble", f.pipeline_seconds(stage, axes.pp, axes.vpp, m)[1])
            executed += tower.executed_flops(first) * self._sequences(tower)
            hidden[tower.name] = (forward.total, backward.total + again.total)
        if self.contrastive:
            self._loss_seconds(add)
        parallel = self.cfg.parallel
        average = self.cfg.optim.ema_decay is not None
        for tower in self._trained:
            count = max(tower.parameters(rank) for rank in range(tower.axes.pp))
            ranks = data_ranks(tower.axes, self.num_gpus)
            members = max(1, self.gpu.gpus_per_node // (tower.axes.tp * tower.axes.pp))
            reduce = f.collective_seconds(self.gpu, 4 * count, ranks, members)
            gather = f.collective_seconds(self.gpu, count * tower.work.number, ranks, members)
            if not parallel.distributed_optimizer:
                reduce, gather = 2 * reduce, 0.0
            there, back = hidden[tower.name]
            add(
                "gradient reduction",
                f.shown_seconds(reduce, back, self.gpu) if parallel.overlap_grad_reduce else reduce,
            )
            shown = f.shown_seconds(gather, there, self.gpu) if parallel.overlap_param_gather else gather
            add("parameter gather", shown)
            add("optimizer", f.update_seconds(self.gpu, count / self._shards(tower), self.cfg.optim.name, average))
        if self.gpu.slowdown > 1:
            add("everything else (fitted)", sum(parts.values()) * (self.gpu.slowdown - 1))
        add("data", self._data_seconds(sum(parts.values())))
        return PhaseSeconds(self.phase, parts, self._model_flops(), executed)

    def _stage_transfer(self, tower: Tower) -> float:
        """Of hidden states to the next stage, which is on another node when a node does not hold all stages."""
        axes, gpu = tower.axes, self.gpu
        port = gpu.link_gb_s if axes.tp * axes.pp <= gpu.gpus_per_node else gpu.network_gb_s
        sent = f.layer_input_bytes(tower.section, tower.work)
        return sent / (port * 1e9 * gpu.link_share) + gpu.latency_us * 1e-6

    def _loss_seconds(self, add) -> None:  # type: ignore[no-untyped-def]
        cfg, gpu = self.cfg, self.gpu
        embed, batch = cfg.model.embed_dim, cfg.train.global_batch_size
        local = batch // self.num_gpus
        precision = cfg.train.parameter_precision
        products = f.loss_flops(local, batch, embed) / (2 * local * embed)
        matmul = f.matmul_seconds(gpu, precision, local, embed, products)
        # A tile of fp32 products is written and read; backward, twice, and its 16-bit weights as well.
        add("loss", matmul + f.memory_seconds(gpu, local * batch * (8 + 2 * 12)))
        whole = 2 * batch * embed * self.vision.work.number
        add("feature gather", f.collective_seconds(gpu, whole, self.num_gpus, gpu.gpus_per_node))

    def _data_seconds(self, rest: float) -> float:
        """What decoding adds to a step that otherwise takes `rest`; and the way of pixels to the GPU, which every pass
        over them waits for."""
        images = self.images
        waited = max(0.0, images.seconds - rest) if images.hidden else images.seconds
        if images.on_gpu:
            return waited
        passes = sum(
            one.rows * (1 if one.one_pass or not self.contrastive or not one.trained else 2)
            for one in (self.vision, self.teacher)
            if one is not None
        )
        return waited + f.image_bytes(self.cfg.model.vision, passes) / (self.gpu.host_gb_s * 1e9)

    def _sequences(self, tower: Tower) -> int:
        return self.cfg.train.global_batch_size * (self.cfg.data.frames if tower is self.vision else 1)

    def _model_flops(self) -> float:
        total = 0.0
        for tower in filter(None, (self.teacher, self.text, self.vision)):
            total += tower.flops[tower.trained] * self._sequences(tower)
        return total


def stage_range(layers: Sequence[range]) -> str:
    """The text "0-11, 24-35"."""
    return ", ".join(f"{part.start}-{part.stop - 1}" if len(part) > 1 else f"{part.start}" for part in layers if part)
