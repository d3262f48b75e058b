"""What a training step takes, as formulae of sizes: parameters, bytes, FLOPs, seconds. No torch, nothing measured.

Letters: w width, f hidden width of the MLP, g 2 for a gated MLP and 1 otherwise, t tensor-parallel ranks, S tokens of a
sequence, R rows = S (padded to a multiple of t under sequence parallelism) x sequences of a microbatch, r the rows that
a rank keeps between the linears: R / t under sequence parallelism, else R; e bytes of a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

from megaeva.config.fp8 import features_on_rank
from megaeva.config.schema import TextSection, VisionSection
from megaeva.planning.gpus import Gpu, Precision

GIB = 1 << 30
# Of a layer's forward pass: linears, norms, attention, activation, sums, casts; counted in layer.py's calls.
_KERNELS = 20
_TILE_ROWS, _TILE_COLUMNS = 4096, 8192  # csrc/contrastive/contrastive_cuda_launch.cpp
# `make bench-data` (benchmarks/log.md): 1,016 JPEGs of 512 pixels a second in two worker processes, a core for each.
_DECODED_BY_WORKER = 508.0


# ------------------------------------------------------------------------------------------------------- parameters


def layer_parameters(section: VisionSection | TextSection, tp: int = 1) -> int:
    """Parameters of one layer on one of `tp` ranks: 4 w^2 + (g + 1) f w in linears, biases, norms.

    Cut over tp: the linears, biases of column linears (qkv, fc1), inner norms. Whole: biases of proj and fc2, the two
    norms. Source: model/attention.py, mlp.py, norm.py; equal to facts.md 1c for every variant (tests).
    """
    w, f, gates, terms = section.hidden_size, section.ffn_hidden_size, _gates(section), _norm_terms(section)
    qkv_bias = {"none": 0, "qv": 2 * w, "qkv": 3 * w}[section.qkv_bias if isinstance(section, VisionSection) else "qkv"]
    cut = 4 * w * w + qkv_bias + (gates + 1) * f * w + gates * f
    if isinstance(section, VisionSection):
        cut += terms * (w * section.sub_ln_attention + f * section.sub_ln_mlp)
    return cut // tp + 2 * w + 2 * terms * w


def first_parameters(section: VisionSection | TextSection, tp: int = 1) -> int:
    """Of what precedes the layers: patches, cls, positions and ln_pre; or words (cut over tp where it divides them) and
    positions."""
    w = section.hidden_size
    if isinstance(section, TextSection):
        words = section.vocab_size // tp if section.vocab_size % tp == 0 else section.vocab_size
        return words * w + section.context_length * w
    patch = 3 * section.patch_size**2 + section.patch_bias
    return (patch + 1 + section.num_patches + 1 + section.ln_pre * _norm_terms(section)) * w


def last_parameters(section: VisionSection | TextSection, out_dim: int, bias: bool | None = None) -> int:
    """Of what follows the layers: the final norm and the projection to `out_dim`, whole on every rank."""
    if bias is None:
        bias = isinstance(section, VisionSection) and section.head_bias
    return (_norm_terms(section) + out_dim) * section.hidden_size + bias * out_dim


def tower_parameters(section: VisionSection | TextSection, out_dim: int) -> int:
    """Of a whole tower with its head."""
    layers = section.num_layers * layer_parameters(section)
    return first_parameters(section) + layers + last_parameters(section, out_dim)


def _gates(section: VisionSection | TextSection) -> int:
    return 2 if section.activation == "swiglu" else 1


def _norm_terms(section: VisionSection | TextSection) -> int:
    """Parameters of a norm for each number of its width: weight, and for LayerNorm bias."""
    return 1 if isinstance(section, VisionSection) and section.norm == "rmsnorm" else 2


# ------------------------------------------------------------------------------------------------ bytes of the state


def number_bytes(precision: Precision) -> int:
    """Of a parameter and of an activation; FP8 is a matter of the products, the rest is bf16."""
    return 4 if precision == "fp32" else 2


def gradient_bytes(trained: int) -> int:
    """4 for each trained parameter: DDP's buffers are fp32 (parallel/wrap.py, grad_reduce_in_fp32), whole on each rank
    also with the distributed optimizer, which reduces into its own part of them in place."""
    return 4 * trained


def optimizer_bytes(trained: int, precision: Precision, shards: int, average: bool) -> int:
    """Two fp32 moments, an fp32 main copy of 16-bit parameters, an fp32 average if one is kept, over `shards` ranks.

    12 bytes a parameter in bf16, the K of ZeRO (Rajbhandari et al. 2020, section 3.1); 8 in fp32, whose parameters are
    their own main copy. Padding of mcore's buffers is left out.
    """
    return -(-(8 + 4 * (precision != "fp32") + 4 * average) * trained // shards)


def fp8_weight_bytes(weights: int) -> int:
    """2 for each weight that multiplies in FP8: Transformer Engine keeps it in rows and transposed through a step."""
    return 2 * weights


# ------------------------------------------------------------------------------------------------- bytes of activations


@dataclass(frozen=True)
class Work:
    """One microbatch of a tower on a rank.

    Attributes:
        tokens: S, padding not counted.
        sequences: images or captions.
        tp: t.
        sequence_parallel: whether rows are cut over tp between the linears.
        precision: of the run.
        transformer_engine: False: this project's own operators, as on a CPU.
        gradient_copies: a CPU adds a 16-bit gradient to the fp32 buffer through a copy of it in fp32.
    """

    tokens: int
    sequences: int
    tp: int
    sequence_parallel: bool
    precision: Precision
    transformer_engine: bool
    gradient_copies: bool = False

    @property
    def rows(self) -> int:
        """R."""
        cut = self.tp if self.sequence_parallel else 1
        return -(-self.tokens // cut) * cut * self.sequences

    @property
    def own_rows(self) -> int:
        """r."""
        return self.rows // self.tp if self.sequence_parallel else self.rows

    @property
    def number(self) -> int:
        """e."""
        return number_bytes(self.precision)

    @property
    def gradient_number(self) -> int:
        """Bytes for each number of a weight's gradient until it is in the fp32 buffer."""
        return self.number + 4 * (self.gradient_copies and self.number < 4)


def layer_kept_bytes(
    section: VisionSection | TextSection, work: Work, in_fp8: Sequence[str] = (), selective: bool = False
) -> int:
    """What one layer keeps for its backward pass, without recomputation or with that of attention.

    From what each operator of model/ saves. Of r rows of w: both norms' inputs and both linears' inputs (pre-norm), or
    the linears' inputs and the norms', which are the branches' outputs (post-norm): 4 r w e either way, and the norms'
    moments. Of R rows, cut over t: qkv 3 w, attention's output w, its log-sum-exps; fc1's output g f; the activation's
    output f. An inner norm adds its output; cut over t it keeps an fp32 copy of its input in place of the input
    (norm.py, _Sharded). Where sequence parallelism pads the sequence, proj keeps a padded copy of its input. Under
    `selective` attention runs again from qkv: with flash attention that drops the log-sum-exps and rotated q and k, and
    the output only where the next operator does not keep it. A linear in FP8 keeps its input as 1 byte; nothing is
    saved where someone else keeps the same tensor in bf16. SwiGLU without an operator of its own (on GPUs) keeps
    silu(gate) too; Transformer Engine's attention gets rotated copies of q and k.
    """
    w, f, gates, e = section.hidden_size, section.ffn_hidden_size, _gates(section), work.number
    own, rows = work.own_rows, work.rows
    vision = section if isinstance(section, VisionSection) else None
    moments = 4 * _norm_terms(section)

    def linear(name: str, bytes_otherwise: int = e) -> int:
        return 1 if name in in_fp8 else bytes_otherwise

    kept = 2 * own * (w * e + moments) + own * w * (linear("qkv") + linear("fc1"))
    inner = rows * w // work.tp  # numbers of attention's output
    kept += inner * 3 * e
    if not (selective and vision and vision.sub_ln_attention and work.tp > 1):
        kept += inner * e
    if not selective:
        kept += 4 * work.tokens * work.sequences * section.num_heads // work.tp
        if vision and vision.rope and work.transformer_engine:
            kept += 2 * inner * e
    if vision and vision.sub_ln_attention:
        kept += _inner_norm(inner, rows, moments, work, e, input_kept=True) + inner * linear("proj")
    else:
        padded = work.rows > work.tokens * work.sequences
        kept += inner * linear("proj", e if padded else 0)  # otherwise it is attention's output
    hidden = rows * f // work.tp
    kept += hidden * gates * e
    if gates == 2 and work.transformer_engine:
        kept += hidden * e
    if vision and vision.sub_ln_mlp:
        kept += _inner_norm(hidden, rows, moments, work, e, input_kept=False)
    return kept + hidden * linear("fc2")


def _inner_norm(numbers: int, rows: int, moments: int, work: Work, e: int, *, input_kept: bool) -> int:
    if work.tp > 1:
        return 4 * numbers + 4 * rows
    return (0 if input_kept else numbers * e) + rows * moments


def layer_input_bytes(section: VisionSection | TextSection, work: Work) -> int:
    """r w e: all that a recomputed layer keeps, and what one pipeline stage hands to the next."""
    return work.own_rows * section.hidden_size * work.number


def backward_bytes(section: VisionSection | TextSection, work: Work) -> int:
    """The most that one layer's backward pass holds beside what is kept. It begins with the MLP: the gradient of the
    residual stream (above the text tower's last layer that of the whole sequence, whose rows it is a view of) and the
    most of these.

    Let h be R f / t numbers. Autograd frees what an operator kept as soon as its backward is done, so:
    fc2 has its input's gradient h and its weights' f w / t, before they are in the fp32 buffer, and under sequence
    parallelism its output's gathered gradient R w. The activation has the
    gradient of its output h in place of fc2's input, and of its input g h. fc1 has the latter in place of its output,
    which the activation kept, its own input's gradient R w and its weights' g f w / t, and fc2's input is gone. An
    inner norm keeps h more, which is gone when the activation begins; cut over t it keeps fp32, and computes in it: at
    the end of norm.py's _Sharded.backward the gradient, its product with the weights, that of the input before and
    after its scale are there, and in 16 bits the incoming and the outgoing one. A post-norm that is this project's
    RMSNorm comes first of all and computes five of r w in fp32, in fp32 runs four. QuickGELU's forward pass, of three
    operators, has its input and what silu gives, beside what it keeps. What FP8 keeps in 1 byte is freed as e here.
    """
    w, f, gates, e = section.hidden_size, section.ffn_hidden_size, _gates(section), work.number
    numbers, weights = work.rows * f // work.tp, f * w // work.tp * work.gradient_number
    hidden, stream = numbers * e, work.own_rows * w * e
    whole = work.rows * w * e
    if isinstance(section, TextSection):
        stream = whole
    inner = isinstance(section, VisionSection) and section.sub_ln_mlp
    inner_kept = inner * (4 * numbers if work.tp > 1 else hidden)
    moments = [
        hidden + weights + (whole if work.sequence_parallel and work.tp > 1 else 0),
        gates * hidden - inner_kept,
        whole + gates * weights - hidden - inner_kept,
    ]
    if inner and work.tp > 1:
        moments.append((12 if e == 4 else 16 + e) * numbers)
    if section.activation == "quick_gelu":
        moments.append(2 * hidden - stream)
    if isinstance(section, VisionSection) and section.norm_position == "post" and _rms_by_hand(section, work):
        moments.append((20 if e == 2 else 16) * work.own_rows * w)
    return stream + max(moments)


def _rms_by_hand(section: VisionSection, work: Work) -> bool:
    """Whether norms are this project's RMSNorm (norm.py, _RMS), whose fp32 numbers are tensors."""
    return section.norm == "rmsnorm" and not work.transformer_engine


def forward_bytes(section: VisionSection | TextSection, work: Work, frozen: bool) -> int:
    """The most that one layer holds in a forward pass that keeps nothing, of a tower that is trained or `frozen`.

    Four times r w: the tower's frame holds the first layer's input, the layer's its own, the sum after attention, and
    the norm's output (pre-norm) or attention's (post-norm). Beside them the most of these, h as in `backward_bytes`:
    fc1's product and, where mcore adds the bias apart (tp), their sum, and of a frozen weight the gathered input, which
    otherwise is in mcore's buffer; the activation's input and output, of QuickGELU and of SwiGLU without an operator
    what is between; a cut inner norm's input, output and fp32 numbers (norm.py, _Sharded); and RMSNorm of this project
    (norm.py, _RMS), before the MLP or of its output.
    """
    gates, e = _gates(section), work.number
    numbers = work.rows * section.ffn_hidden_size // work.tp
    stream = work.own_rows * section.hidden_size * e
    apart = work.tp > 1 and not work.transformer_engine
    quick = section.activation == "quick_gelu"
    gathered = frozen * work.sequence_parallel * work.rows * section.hidden_size * e
    moments = [(1 + apart) * gates * numbers * e + gathered, (gates + 1 + quick) * numbers * e]
    if gates == 2 and work.transformer_engine:
        moments.append(4 * numbers * e)
    if isinstance(section, VisionSection):
        if section.sub_ln_mlp and work.tp > 1:
            moments.append((16 if e == 4 else 18 + e) * numbers)
        if _rms_by_hand(section, work):
            # Of e = 2 in fp32, there scaled, and scaled in e; of e = 4 scaled and weighted. The MLP's output, or no
            # output of the norm yet.
            moments.append(((5 if e == 2 else 2) + (1 if section.norm_position == "post" else -1)) * stream)
    return 4 * stream + max(moments)


def gathered_bytes(section: VisionSection | TextSection, work: Work, overlap: bool) -> int:
    """Under sequence parallelism R w e, the gathered input of a column linear (mcore keeps one buffer); with
    Transformer Engine's transfer overlap four of them, one for each linear (assumed)."""
    if not work.sequence_parallel or work.tp == 1:
        return 0
    return work.rows * section.hidden_size * work.number * (4 if overlap else 1)


def embedding_bytes(section: VisionSection | TextSection, work: Work, backward: bool = True) -> int:
    """Beyond the first layer's own: pixels in the tower's dtype, for the gradient of the patch weights; under sequence
    parallelism the whole sequence, of which a rank's rows are a view (ln_pre's output is none); for a backward pass
    ln_pre's input."""
    viewed = backward or isinstance(section, TextSection) or not section.ln_pre
    extra = viewed * (work.rows - work.own_rows) * section.hidden_size * work.number
    if isinstance(section, TextSection):
        return extra + 8 * work.tokens * work.sequences
    extra += 3 * section.image_size**2 * work.sequences * work.number
    if section.rope:  # cos and sin, shared by all layers; of each image's own patches where some are dropped
        copies = work.sequences if work.tokens < section.num_patches + 1 else 1
        extra += 8 * work.tokens * copies * (section.hidden_size // section.num_heads)
    return extra + (section.ln_pre and backward) * work.own_rows * (section.hidden_size * work.number + 8)


def embedding_gradient_bytes(section: VisionSection | TextSection, work: Work) -> int:
    """At the end of a backward pass: the gradient of the words' vectors, whole on each rank that holds them before it
    is in the fp32 buffer, and that of the sequence. Most of all where microbatches are small. Of patches nothing to
    speak of."""
    if not isinstance(section, TextSection):
        return 0
    cut = work.tp if section.vocab_size % work.tp == 0 else 1
    words = section.vocab_size // cut * work.gradient_number
    return (words + 2 * work.rows * work.number) * section.hidden_size


def ending_bytes(section: VisionSection | TextSection, work: Work) -> int:
    """Above the last layer: the inputs of the final norm and of the head, one token of each sequence. Of cls the norm
    keeps a view of all last hidden states, under sequence parallelism of one token of each rank."""
    token = work.sequences * section.hidden_size * work.number
    if isinstance(section, TextSection):
        return 2 * token
    return token + (work.tp * token if work.sequence_parallel else layer_input_bytes(section, work))


def warmup_depth(costs: Sequence[int], pp: int, rank: int, microbatches: int) -> int:
    """The most bytes of activations that a pipeline rank holds, its chunks keeping `costs` for each microbatch.

    1F1B: rank i of p has begun p - i microbatches before its first backward pass (Narayanan et al. 2021, section 2.2).
    Interleaved: 2 (p - i - 1) + (v - 1) p passes of chunks, p microbatches of a chunk in turn, and one more; then one
    forward and one backward alternate (mcore get_pp_rank_microbatches). The schedule is run through, as chunks differ.
    """
    vpp = len(costs)
    if vpp == 1:
        return min(microbatches, pp - rank) * costs[0]
    # A few rounds: after the warm-up the schedule repeats itself.
    total = min(microbatches, 4 * pp) * vpp
    warmup = min(total, 2 * (pp - rank - 1) + (vpp - 1) * pp)
    chunk = [k // pp % vpp for k in range(total)]
    held = sum(costs[chunk[k]] for k in range(warmup))
    most = held
    for k in range(warmup, total):
        held += costs[chunk[k]]
        most = max(most, held)
        held -= costs[vpp - 1 - chunk[k - warmup]]
    return most


# ------------------------------------------------------------------------------------------------- bytes of the loss


def feature_bytes(samples: int, embed_dim: int, e: int) -> int:
    """Rows of one tower's whole batch on a rank and their gradients: 2 x samples x E (schedule.py, global_step)."""
    return 2 * samples * embed_dim * e


def loss_bytes(local: int, batch: int, embed_dim: int, e: int, on_cpu: bool = False) -> int:
    """Of the contrastive loss on a rank with `local` pairs of `batch`.

    Unit rows of both modalities of all ranks, a tile of products, fp32 gradients of this rank's rows and, while the
    keys of other ranks are gone through, one more; on a single rank in 16 bits sums as large; and the float64 numbers
    of each pair. Never batch^2. Source: losses/contrastive.py, csrc.
    """

    def tile(keys: int) -> int:
        return _cpu_tile_bytes(local, keys, embed_dim, e) if on_cpu else _gpu_tile_bytes(local, keys, e)

    gradient = 4 * local * embed_dim
    if batch > local:
        most = max(2 * gradient + tile(batch), 3 * gradient + tile(batch - local))
    else:
        most = (2 if e == 4 else 3) * gradient + tile(batch)
    return 2 * batch * embed_dim * e + most + 8 * 6 * batch


def _gpu_tile_bytes(queries: int, keys: int, e: int) -> int:
    """fp32 products, 16-bit weights beside them."""
    return min(_TILE_ROWS, queries) * min(_TILE_COLUMNS, keys) * (4 + (e if e == 2 else 0))


def _cpu_tile_bytes(queries: int, keys: int, embed_dim: int, e: int) -> int:
    """fp32 products and their transpose, panels of both sides that multiply by 64, fp32 copies of 16-bit rows, and
    four numbers of each column for each 64 rows. Less with AVX512-BF16, whose panels are 16-bit. Source:
    csrc/contrastive/matmul_cpu.h, contrastive_cpu.cpp."""
    rows, columns = min(2048, queries), min(512, keys)
    panels = _up(columns, 64) * embed_dim + _up(embed_dim, 64) * (columns + rows)
    copies = (rows + columns) * embed_dim if e == 2 else 0
    return 4 * (2 * rows * columns + panels + copies + 4 * -(-rows // 64) * columns)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def distillation_bytes(section: VisionSection, work: Work, masked: int, out_dim: int) -> int:
    """The most that a MIM student's microbatch holds above its last layer, with `masked` rows for the loss; targets
    are counted elsewhere.

    The loss: the picked rows and the normed ones, and six fp32 numbers for each that is predicted: what its backward
    pass multiplies, and gradients on the way (losses/feature_distill.py). The norm's backward pass: picked rows, the
    gradient that comes and the one that goes, of this project's RMSNorm five in fp32. Then the gradient of picked rows
    is put into one of the patches, and that into the sequence's.
    """
    w, e = section.hidden_size, work.number
    loss = masked * (w * 2 * e + 4 * _norm_terms(section) + out_dim * 24)
    norm = masked * w * (24 if _rms_by_hand(section, work) else 3 * e)
    return max(loss, norm, 2 * work.rows * w * e)


# ----------------------------------------------------------------------------------------------- bytes of the images


def image_bytes(section: VisionSection, images: int) -> int:
    """Decoded and normalised: fp32, three colours (data/batch.py)."""
    return 12 * section.image_size**2 * images


def batches_held(workers: int, on_gpu: bool, threads: bool) -> int:
    """Batches of a data block that a rank holds beside a step's work.

    The trainer's own, and if a thread builds them (data/loader.py, _Thread) two that wait and the one it has in hand;
    DALI's copy of that one besides, while its output is put in place. Of worker processes, each two. Without workers
    the trainer decodes, between steps.
    """
    if workers == 0:
        return 1
    return 4 + on_gpu if threads else 1 + 2 * workers


# ------------------------------------------------------------------------------------------------------------ FLOPs


def layer_flops(section: VisionSection | TextSection, tokens: int) -> tuple[int, int]:
    """(linears, attention) of one layer, one sequence, forward: 2 S (4 w^2 + (g + 1) f w) and 4 S^2 w.

    A multiplication and an addition are 2. Attention counts the whole S x S also where it is causal, as PyTorch's
    FlopCounterMode does.
    """
    w, f = section.hidden_size, section.ffn_hidden_size
    return 2 * tokens * (4 * w * w + (_gates(section) + 1) * f * w), 4 * tokens * tokens * w


def first_flops(section: VisionSection | TextSection) -> int:
    """Of the patch embedding of one image, all patches, forward: 2 N 3 p^2 w; looking up words is none."""
    if isinstance(section, TextSection):
        return 0
    return 2 * section.num_patches * 3 * section.patch_size**2 * section.hidden_size


def last_flops(section: VisionSection | TextSection, out_dim: int, rows: int = 1) -> int:
    """Of the projection of `rows` tokens of one sequence, forward: 2 w E each."""
    return 2 * rows * section.hidden_size * out_dim


def tower_flops(section: VisionSection | TextSection, tokens: int, out_dim: int, rows: int = 1) -> tuple[int, int]:
    """(forward, forward and backward) of one sequence, the model's own: nothing is computed twice.

    Each product of the forward pass has two in the backward pass, of the inputs' and of the weights' gradients; pixels
    want none. Equal to FlopCounterMode's count for every variant (tests).
    """
    first = first_flops(section)
    rest = section.num_layers * sum(layer_flops(section, tokens)) + last_flops(section, out_dim, rows)
    return first + rest, 2 * first + 3 * rest


def loss_flops(local: int, batch: int, embed_dim: int) -> float:
    """Of InfoNCE on a rank: 1 product of local x batch x E forward, and backward 2 + 1/ranks and 2 (1 - 1/ranks).

    Source: losses/contrastive.py; open_clip's needs 6 products and local x batch numbers of memory.
    """
    share = local / batch
    return 2.0 * local * batch * embed_dim * (1 + 2 + share + 2 * (1 - share))


# ----------------------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True)
class Seconds:
    """Seconds by what they are spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tp: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory + other.memory,
            self.tp + other.tp,
        )

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.matmul * factor, self.attention * factor, self.memory * factor, self.tp * factor)

    @property
    def total(self) -> float:
        """All of them."""
        return self.matmul + self.attention + self.memory + self.tp


def matmul_share(gpu: Gpu, smallest: float) -> float:
    """The part of the peak that a product reaches, by the smallest of its three sizes: between the table's sizes linear
    in the logarithm, below and above them as at its ends. Small products leave processors idle and move more bytes for
    each FLOP. The table is assumed (gpus.py)."""
    points = sorted(gpu.matmul_share.items())
    if smallest <= points[0][0]:
        return points[0][1] * smallest / points[0][0]
    for (low, at_low), (high, at_high) in pairwise(points):
        if smallest <= high:
            return at_low + (at_high - at_low) * log2(smallest / low) / log2(high / low)
    return points[-1][1]


def matmul_seconds(gpu: Gpu, precision: Precision, rows: float, inputs: float, outputs: float) -> float:
    """2 R inputs outputs / (peak x share), or the time its bytes take if that is longer (roofline)."""
    share = matmul_share(gpu, min(rows, inputs, outputs)) * (gpu.fp8_share if precision == "fp8" else 1.0)
    moved = (rows * inputs + inputs * outputs) * (1 if precision == "fp8" else number_bytes(precision))
    moved += rows * outputs * number_bytes(precision)
    return max(2.0 * rows * inputs * outputs / (gpu.peak_tflops[precision] * 1e12 * share), memory_seconds(gpu, moved))


def memory_seconds(gpu: Gpu, moved: float) -> float:
    """Bytes read and written / (bandwidth x share)."""
    return moved / (gpu.memory_gb_s * 1e9 * gpu.memory_share)


def collective_seconds(gpu: Gpu, whole: float, ranks: int, per_node: int, times: float = 1.0) -> float:
    """Of `times` all-gathers or reduce-scatters of `whole` bytes over `ranks`: (n - 1) / n whole / bandwidth + latency.

    The bytes are the optimal ring's (Thakur et al. 2005); an all-reduce is two. Its latency, a term for each of n - 1
    steps, is not: `latency_us` is a call's, whatever n, as NCCL's steps overlap (assumed; once a step, 15 us would make
    18B's 35.9 days on 360 A100 38.0). Ranks on one node use its links; otherwise a ring leaves a node through the
    network ports of its `per_node` members there, so it has their sum, at most a link's.
    """
    if ranks == 1:
        return 0.0
    port = gpu.link_gb_s if ranks <= per_node else min(gpu.link_gb_s, gpu.network_gb_s * per_node)
    return times * ((ranks - 1) / ranks * whole / (port * 1e9 * gpu.link_share) + gpu.latency_us * 1e-6)


def layer_seconds(
    section: VisionSection | TextSection, work: Work, gpu: Gpu, in_fp8: Sequence[str] = (), overlap: bool = False
) -> tuple[Seconds, Seconds]:
    """(forward, backward) of one layer on one rank for one microbatch.

    Linears: `matmul_seconds` of R rows and the features on the rank; backward twice that. Attention: its FLOPs at
    attention_share of the bf16 peak, backward 2.5 times (flash attention makes the scores again: 5 products for 2).
    Element-wise work by bytes, forward: each norm reads and writes r w, each residual sum reads two and writes one, the
    activation reads g f and writes f of R / t; inner norms and rotations likewise; backward twice that (each has an
    input more and an output more). A pass takes at least launch_us for each of its kernels.
    Transfers: with sequence parallelism 2 gathers and 2 reduce-scatters of R w e forward; backward 2 gathers that are
    waited for, and 2 gathers and 2 reduce-scatters beside the products of the gradients. Without it 2 all-reduces
    forward and 2 beside products backward (mcore tensor_parallel/layers.py). `overlap`: Transformer Engine hides
    hidden_share of the forward ones too. A cut inner norm adds a small all-reduce each way.
    """
    w, f, gates, e, t = section.hidden_size, section.ffn_hidden_size, _gates(section), work.number, work.tp
    vision = section if isinstance(section, VisionSection) else None
    plain: Precision = "bf16" if work.precision == "fp8" else work.precision
    products = sum(
        matmul_seconds(gpu, "fp8" if name in in_fp8 else plain, work.rows, inputs, outputs)
        for name, (inputs, outputs) in features_on_rank(section, t).items()
    )
    scores = layer_flops(section, work.tokens)[1] * work.sequences / t / (2 if vision is None else 1)
    attention = scores / (gpu.peak_tflops[plain] * 1e12 * gpu.attention_share)
    hidden, inner = work.rows * f / t, work.rows * w / t
    numbers = (4 + 6) * work.own_rows * w + (gates + 1 + 2 * (gates - 1)) * hidden
    numbers += {"quick_gelu": 4.0}.get(section.activation, 0.0) * hidden
    if vision:
        numbers += 2 * inner * vision.sub_ln_attention + 2 * hidden * vision.sub_ln_mlp
        numbers += 6 * inner * (vision.qkv_bias == "qv") + 12 * inner * vision.rope
    numbers += 2 * (work.rows * w * len(in_fp8))  # casts
    memory = memory_seconds(gpu, numbers * e)
    launches = _KERNELS * gpu.launch_us * 1e-6
    idle = max(0.0, launches - products - attention - memory)
    whole = work.rows * w * e
    inner_norms = (vision.sub_ln_attention + vision.sub_ln_mlp) if vision and t > 1 else 0
    small = 2 * inner_norms * gpu.latency_us * 1e-6
    one = collective_seconds(gpu, whole, t, gpu.gpus_per_node)
    beside = 4 * one
    shown = max(beside * (1 - gpu.hidden_share), beside - 2 * products)
    before = 4 * one * (1 - gpu.hidden_share if overlap else 1.0) + small
    after = shown + small + (2 * one if work.sequence_parallel and t > 1 else 0.0)
    return (
        Seconds(products, attention, memory + idle, before),
        Seconds(2 * products, 2.5 * attention, 2 * (memory + idle), after),
    )


def ends_seconds(gpu: Gpu, flops: float, precision: Precision, width: int) -> Seconds:
    """Forward of a patch embedding or projection, whose work is the same on all tp ranks."""
    plain: Precision = "bf16" if precision == "fp8" else precision
    return Seconds(matmul=flops / (gpu.peak_tflops[plain] * 1e12 * matmul_share(gpu, min(width, 512))))


def pipeline_seconds(stage: float, pp: int, vpp: int, microbatches: int) -> tuple[float, float]:
    """(work, bubble) of one pass: m microbatches of the slowest stage, and (p - 1) / v of one microbatch's time idle.

    Source: Narayanan et al. 2021, equations in sections 2.2.1 and 2.2.2: bubble / work = (p - 1) / (v m).
    """
    return microbatches * stage, (pp - 1) / vpp * stage


def shown_seconds(transfer: float, beside: float, gpu: Gpu) -> float:
    """What a transfer of that many seconds adds to the work it overlaps with: all that does not fit beside it, and at
    least what cannot be hidden."""
    return max(transfer * (1 - gpu.hidden_share), transfer - beside)


def decoding_seconds(gpu: Gpu, images: int, workers: int, on_gpu: bool) -> float:
    """Of so many images on one rank: by DALI on the GPU, or in worker processes that have a core each."""
    return images / (gpu.decoded_images_s if on_gpu else _DECODED_BY_WORKER * max(1, workers))


def update_seconds(gpu: Gpu, trained: float, name: str, average: bool) -> float:
    """Of the optimizer's step over the parameters of one rank's shard, by bytes: AdamW reads 16 and writes 12, the copy
    to 16-bit parameters 6, norm and clipping 12; LAMB's directions, ratios and sums 52 more (optim/lamb.py)."""
    return memory_seconds(gpu, trained * (46 + 52 * (name == "lamb") + 12 * average))
