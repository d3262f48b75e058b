"""The sections of a recipe: pydantic models, no torch import.

Defaults are neutral; what a published model used is written in recipes/, with its source in ../shared/facts.md terms.
Unknown keys are errors (`extra="forbid"`); `megaeva.config.load` turns all of them into one message with file and line.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

PathText = Annotated[str, Field(min_length=1)]
"""Of a file or a folder. An empty one would be the current folder."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------------------- model


class VisionSection(Section):
    """A vision tower. Numbers of published towers are in `variants.py`."""

    image_size: int = Field(gt=0, description="pixels, square")
    patch_size: int = Field(gt=0, description="pixels, square")
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    activation: Literal["gelu", "quick_gelu", "swiglu"] = Field(description="gelu is the exact erf form")
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = Field(1e-6, ge=1e-12, le=0.1)
    norm_position: Literal["pre", "post"] = Field(
        "pre", description="post: x + norm(f(x)), EVA's res-post-norm (E/14, 18B)"
    )
    qkv_bias: Literal["none", "qv", "qkv"] = Field(description="qv: the key bias is a fixed zero, not a parameter")
    sub_ln_attention: bool = Field(False, description="norm between attention output and projection (inner_attn_ln)")
    sub_ln_mlp: bool = Field(False, description="norm before the second MLP projection (ffn_ln)")
    rope: bool = Field(False, description="2-D rotary embedding on q and k, cls token skipped")
    rope_pretrain_grid: int = Field(16, gt=0, description="grid the rotary angles are rescaled onto (pt_seq_len)")
    patch_bias: bool = True
    ln_pre: bool = Field(False, description="norm after position embedding (OpenAI / open_clip towers)")
    head_bias: bool = False
    patch_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of patches dropped in contrastive training")
    drop_path: float = Field(0.0, ge=0.0, lt=1.0, description="stochastic depth of the last block; linear in depth")

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, cls not counted."""
        return self.grid_size**2


class TextSection(Section):
    """A causal text tower: pre-LN LayerNorm, full qkv bias, EOT-argmax pooling."""

    context_length: int = Field(77, ge=2, description="tokens, sot and eot included")
    vocab_size: int = Field(49408, gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm_epsilon: float = Field(1e-5, ge=1e-12, le=0.1)


class LogitScaleSection(Section):
    """Inverse temperature, kept as its logarithm, and for the sigmoid loss the bias of all logits."""

    init: float = Field(2.6592600369327783, description="ln(1/0.07); SigLIP starts at ln(10)")
    bias: float | None = Field(
        None, ge=-1000.0, le=1000.0, description="of loss.name=sigmoid, where SigLIP starts at -10; None: no bias"
    )
    trainable: bool = Field(True, description="of both")
    max: float = Field(
        4.605170185988092, le=88.0, description="clamped to [0, max] after each step; ln(100); fp32 ends at exp(88.7)"
    )


class ModelSection(Section):
    """Two towers and their joint embedding."""

    variant: str | None = Field(None, description="a name in VARIANTS that fills the rest; keys given beside it win")
    embed_dim: int = Field(gt=0)
    vision: VisionSection
    text: TextSection
    logit_scale: LogitScaleSection = LogitScaleSection()


# ----------------------------------------------------------------------------------------- losses, MIM and starts


class TeacherSection(Section):
    """The frozen CLIP whose vision tower is distilled."""

    checkpoint: PathText = Field(
        description="run folder of a contrastive run (its newest checkpoint), one checkpoint, or a file of any format "
        "that `megaeva convert` reads"
    )


class LossSection(Section):
    """What a contrastive run minimises over the global batch."""

    name: Literal["infonce", "sigmoid"] = Field(
        "infonce", description="infonce: softmax over the batch in both directions (CLIP); sigmoid: SigLIP"
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0, description="of infonce: share of each target that is spread over the batch"
    )


class MaskSection(Section):
    """BEiT block-wise masking. EVA: 105 of 256 patches, smallest block 16, aspect 0.3."""

    num_masked: int = Field(gt=0, description="upper bound of masked patches in an image")
    min_block: int = Field(gt=0, description="smallest block, patches")
    min_aspect: float = Field(0.3, gt=0.0, le=1.0, description="aspect drawn log-uniform in [min, 1/min]")


class MIMSection(Section):
    """Masked feature distillation."""

    mask: MaskSection
    stop_grad_patch_embed: float = Field(
        1.0, ge=0.0, le=1.0, description="share of gradient kept at the patch embedding; EVA-02 scripts use 0.1"
    )


class InitSection(Section):
    """Where weights come from: run folders, or files of any format that `megaeva convert` reads.

    What is not named starts fresh.
    """

    clip: PathText | None = None
    vision: PathText | None = None
    text: PathText | None = None
    resize: Literal["upstream", "timm"] = Field(
        "upstream",
        description="positions and patch kernels of another size; upstream: bicubic as EVA-CLIP; timm: antialiased",
    )


# ------------------------------------------------------------------------------------------------------------ data


class AugmentSection(Section):
    """Training crop."""

    scale: tuple[float, float] = Field((0.9, 1.0), description="area share of RandomResizedCrop")
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = Field(0.0, ge=0.0, le=1.0)


class PhaseSection(Section):
    """A part of the run with data of its own; weights, optimizer and learning rate go on from the phase before."""

    samples: int = Field(gt=0, description="of this phase; all phases together are train.total_samples")
    train: tuple[str, ...] = Field(description="shards, as data.train")
    patch_dropout: float | None = Field(None, ge=0.0, lt=1.0, description="None: as model.vision.patch_dropout")
    frames: int = Field(
        1, ge=1, description="above 1: samples are videos; a clip's embedding is the mean of so many frames'"
    )


class DataSection(Section):
    """Shards of (jpg|png|webp, txt, json) samples."""

    train: tuple[str, ...] = Field((), description="shard paths, globs or {000..999} ranges")
    frames: int = Field(
        1, ge=1, description="above 1: samples are videos; a clip's embedding is the mean of so many frames'"
    )
    phases: tuple[PhaseSection, ...] = Field((), description="in place of `train`: one after the other")
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    num_workers: int = Field(0, ge=0, le=1024, description="decoding processes on each rank; 0 decodes in the trainer")
    shuffle_buffer: int = Field(2048, ge=1, description="samples, on each worker")
    augment: AugmentSection = AugmentSection()
    tokenizer_subset: PathText | None = Field(
        None, description="vocab.json that `megaeva data` wrote; None: all 49,408"
    )
    max_dropped_share: float = Field(0.01, ge=0.0, le=1.0, description="broken samples above this share stop the run")
    max_image_pixels: int = Field(64_000_000, gt=0, description="larger images are dropped as decompression bombs")


# -------------------------------------------------------------------------------------------------------- training


class AxesSection(Section):
    """How one tower is spread and what it keeps; what is left of the world is data parallel."""

    tp: int = Field(1, ge=1)
    sequence_parallel: bool = Field(False, description="cut tokens over tp between the linears; no effect at tp=1")
    pp: int = Field(1, ge=1, description="pipeline ranks; vision only, text lives on all of them")
    vpp: int = Field(1, ge=1, description="virtual stages of each pipeline rank (interleaved 1F1B)")
    layers_per_stage: tuple[PositiveInt, ...] | None = Field(
        None, description="layers of the pp x vpp virtual stages in order of depth; None: even, the ends lighter"
    )
    recompute: Literal["none", "selective", "full"] | PositiveInt = Field(
        "none",
        description="activations computed again in backward: of attention, all layers, or the first N of a stage",
    )
    tp_comm_overlap: bool = Field(
        False,
        description="Transformer Engine overlaps tp transfers with matrix products; needs CUDA, tp > 1 and "
        "sequence_parallel",
    )

    @field_validator("recompute", mode="before")
    @classmethod
    def _one_message(cls, value: object) -> object:
        # Without it pydantic reports one error for each member of the union.
        if value in ("none", "selective", "full") or (type(value) is int and value > 0):
            return value
        raise ValueError("must be none, selective, full or a number of layers above 0")


class ParallelSection(Section):
    """One grid for each tower; `vision` is also the MIM student's."""

    vision: AxesSection = AxesSection()
    text: AxesSection = AxesSection()
    teacher: AxesSection = AxesSection()
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = Field(False, description="gradients are reduced while backward goes on")
    overlap_param_gather: bool = Field(
        False, description="the distributed optimizer's parameters are gathered during the next forward pass"
    )


class TowerOptimSection(Section):
    """Learning rate of one tower."""

    lr: float = Field(gt=0.0)
    layer_decay: float = Field(1.0, gt=0.0, le=1.0)


class OptimSection(Section):
    """Optimizer and schedule; rates are per step at the given global batch."""

    name: Literal["adamw", "lamb"] = "adamw"
    lamb: Literal["eva", "lamb"] = Field(
        "eva",
        description="of name=lamb; eva: DeepSpeed's FusedLamb, which trained EVA-CLIP; lamb: the paper's algorithm",
    )
    vision: TowerOptimSection
    text: TowerOptimSection | None = Field(None, description="None: as vision")
    frozen: tuple[Literal["vision", "text"], ...] = Field(
        (),
        description="towers locked as a whole, projection included (LiT: [vision]); no drop path, but patch dropout",
    )
    ema_decay: float | None = Field(
        None, gt=0.0, lt=1.0, description="of an average of the weights, kept and evaluated beside them; None: none"
    )
    logit_scale_lr: float = Field(5e-4, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = Field(1e-6, gt=0.0)
    weight_decay: float = Field(0.05, ge=0.0)
    clip_grad_norm: float | None = Field(None, description="global norm over both towers; None: no clipping")
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="cosine ends at this share of the peak")


class Fp8Section(Section):
    """FP8 matrix products in the linears of the transformer layers, as Transformer Engine's recipes define them.

    Parameters and everything else are bf16. Evaluation and a teacher's pass are bf16 too.
    """

    recipe: Literal["delayed", "current", "mxfp8", "blockwise"] = Field(
        "delayed",
        description="where scales come from: earlier steps' largest values; the tensor's own; a power of two for each "
        "32 values (Blackwell); one for each 1x128 or 128x128 block (Hopper, Blackwell)",
    )
    format: Literal["hybrid", "e4m3"] = Field("hybrid", description="hybrid: E4M3 forward, E5M2 for gradients")
    amax_history: int = Field(
        1024, ge=1, le=65536, description="of recipe=delayed: optimizer steps that a scale looks back on"
    )
    amax_compute: Literal["max", "most_recent"] = Field("max", description="of recipe=delayed: which of them counts")
    margin: int = Field(0, ge=0, le=16, description="of recipe=delayed: scales are 2^margin smaller")
    linears: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj", "fc1", "fc2")
    min_features: int = Field(
        0, ge=0, description="linears with fewer input or output features on a rank stay bf16; they gain nothing"
    )
    first_layers_bf16: int = Field(1, ge=0, description="of each tower")
    last_layers_bf16: int = Field(1, ge=0, description="of each tower")
    rehearse: bool = Field(
        False, description="allow a CPU, which emulates the FP8 products (slowly); no effect on a GPU"
    )


MAX_LOSS_SCALE = 2.0**32
"""fp32 must hold it times the loss."""


class Fp16Section(Section):
    """Dynamic loss scale of train.precision=fp16."""

    initial_scale: float = Field(
        65536.0, ge=1.0, le=MAX_LOSS_SCALE, description="EVA-02's DeepSpeed setting, as the window"
    )
    growth_interval: int = Field(500, ge=1, description="steps without overflow after which the scale doubles")
    min_scale: float = Field(1.0, gt=0.0, description="an overflow at this scale stops the run")


class SpikeGuardSection(Section):
    """What happens to a step whose loss or gradient norm stands out of the steps before it.

    Until `window` steps of a phase of the data are accepted nothing is a spike; from then on a loss or norm that is not
    finite is one.
    Features of a contrastive step that are not finite have no loss: they stop the run as they do without a guard.
    """

    action: Literal["skip", "roll_back"] = Field(
        "skip",
        description="skip: no update; roll_back: to weights, optimizer and step of the last checkpoint, going on with "
        "the data after the spike",
    )
    window: int = Field(100, ge=2, description="accepted steps whose median is the measure")
    loss_ratio: float | None = Field(
        2.0, gt=1.0, description="a spike is a loss above this times the median; a negative one, as far above it"
    )
    grad_norm_ratio: float | None = Field(10.0, gt=1.0, description="or a gradient norm above this times the median")
    max_spikes: int = Field(10, ge=1, description="so many without `window` accepted steps between stop the run")


class ProfileSection(Section):
    """Steps that torch.profiler traces, into RUN/profile/."""

    first_step: int = Field(10, ge=0, description="counted from 0; a run resumed later traces its first steps")
    num_steps: int = Field(3, ge=1)
    ranks: tuple[int, ...] | Literal["all"] = Field((0,), description="each writes a trace of its own")

    @field_validator("ranks", mode="before")
    @classmethod
    def _one_message(cls, value: object) -> object:
        # Without it pydantic reports one error for each member of the union.
        if isinstance(value, list | tuple) and all(type(rank) is int for rank in value):
            return tuple(value)
        if value == "all":
            return value
        raise ValueError("must be all or a list of ranks, e.g. [0, 8]")


class TrainSection(Section):
    """Length and batch of a run."""

    total_samples: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    micro_batch_size: int | None = Field(
        None, description="images or captions of one rank in one pass; None: all at once"
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    fp8: Fp8Section = Field(Fp8Section(), description="of precision=fp8")
    fp16: Fp16Section = Field(Fp16Section(), description="of precision=fp16")
    spike_guard: SpikeGuardSection | None = Field(None, description="None: every finite step counts")
    profile: ProfileSection | None = Field(None, description="None: no step is traced")
    log_every_steps: int = Field(10, ge=1)
    timeout_minutes: float = Field(10.0, ge=0.01, le=43200.0, description="a collective that waits longer ends the job")

    @property
    def parameter_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Dtype of parameters and activations; FP8 is a matter of the linears."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def fp8_in_use(self) -> Fp8Section | None:
        """The section, when precision=fp8."""
        return self.fp8 if self.precision == "fp8" else None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.total_samples // self.global_batch_size)


class SaveSection(Section):
    """When checkpoints are written; the last step and SIGTERM save, too."""

    enabled: bool = Field(
        True, description="False: the run leaves no checkpoint and cannot be resumed, e.g. a benchmark"
    )
    every_steps: int | None = None
    every_minutes: float | None = 30.0
    keep: int = Field(2, ge=1)
    asynchronous: bool = Field(True, description="files are written while training goes on; costs a copy in memory")


class ZeroShotSection(Section):
    """A zero-shot classification set."""

    shards: tuple[str, ...]
    classes: PathText = Field(description='JSON file: {"classes": [...], "templates": ["a photo of a {}.", ...]}')


class RetrievalSection(Section):
    """An image-text retrieval set."""

    shards: tuple[str, ...]


class EvalSection(Section):
    """What is measured at the end of a contrastive run and by `megaeva eval`."""

    retrieval: dict[str, RetrievalSection] = {}
    zero_shot: dict[str, ZeroShotSection] = {}
    resize: Literal["crop", "squash"] = "crop"
    crop_share: float = Field(
        1.0, gt=0.0, le=1.0, description="crop: the centre's share of the resized shortest edge (timm's crop_pct)"
    )
    batch_size: int = Field(64, ge=1)
    every_steps: int | None = None


class Config(Section):
    """One training run."""

    task: Literal["mim", "contrastive"]
    run_dir: PathText
    seed: int = Field(0, ge=0, lt=2**63)
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelSection
    teacher: TeacherSection | None = None
    mim: MIMSection | None = None
    loss: LossSection = LossSection()
    init: InitSection = InitSection()
    data: DataSection = DataSection()
    parallel: ParallelSection = ParallelSection()
    optim: OptimSection
    train: TrainSection
    save: SaveSection = SaveSection()
    eval: EvalSection = EvalSection()


# ------------------------------------------------------------------------------------------------------------ loop


class LaunchSection(Section):
    """How a stage is started."""

    num_processes: int = Field(1, ge=1, description="torchrun --nproc-per-node")
    threads_per_process: int | None = Field(None, ge=1, description="OMP_NUM_THREADS")
    extra_torchrun_args: tuple[str, ...] = Field((), description="e.g. --nnodes=45 --rdzv-endpoint=...")


class StageSection(Section):
    """One torchrun job: a recipe beside the loop's file, and keys set on top of it."""

    recipe: PathText
    set: dict[str, object] = Field({}, description="key.path: value, as on the command line")


class TeacherStageSection(Section):
    """Round 0: a run folder that exists, or a contrastive recipe that makes it. Exactly one."""

    checkpoint: PathText | None = None
    stage: StageSection | None = None


class RoundSection(Section):
    """distil -> clip -> evaluate -> promote. The student becomes the next round's teacher."""

    name: str
    distil: StageSection
    clip: StageSection
    controls: dict[str, StageSection] = Field(
        {}, description="extra contrastive runs for comparison; `{teacher}` and `{mim}` in a value become run folders"
    )


class LoopConfig(Section):
    """A weak-to-strong chain."""

    run_dir: PathText
    seed: int = Field(0, ge=0, lt=2**63)
    launch: LaunchSection = LaunchSection()
    teacher: TeacherStageSection
    rounds: tuple[RoundSection, ...]
    report: bool = True
