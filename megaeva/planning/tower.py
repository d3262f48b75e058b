"""One tower on one data rank: what it keeps for its backward pass and how long a microbatch takes. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megaeva.config.fp8 import NAMES, Fp8Linear, features_on_rank, in_fp8
from megaeva.config.schema import AxesSection, Fp8Section, TextSection, VisionSection
from megaeva.config.topology import virtual_stages
from megaeva.planning import formulae as f
from megaeva.planning.formulae import Seconds, Work
from megaeva.planning.gpus import Gpu


@dataclass(frozen=True)
class Tower:
    """One tower of a step, and its work on a data rank."""

    name: str
    section: VisionSection | TextSection
    axes: AxesSection
    out_dim: int
    out_rows: int  # tokens of a sequence that are projected
    head_bias: bool
    trained: bool
    work: Work
    microbatches: int
    fp8: Fp8Section | None
    extra_first: int = 0  # parameters: the mask token

    @cached_property
    def chunks(self) -> tuple[tuple[range, ...], ...]:
        """Layers of each pipeline rank's chunks."""
        stages = virtual_stages(self.axes, self.section.num_layers)
        return tuple(stages[rank :: self.axes.pp] for rank in range(self.axes.pp))

    @property
    def one_pass(self) -> bool:
        """As `schedule.Part.in_one_pass`."""
        return self.microbatches == 1 and self.axes.pp == 1 and self.trained

    @cached_property
    def _fp8_names(self) -> list[tuple[Fp8Linear, ...]]:
        """Of each layer the linears that multiply in FP8; empty where none does."""
        return _names_in_fp8(self.section, self.axes.tp, self.fp8) if self.fp8 and self.trained else []

    def kinds(self, layers: range) -> Sequence[tuple[tuple[Fp8Linear, ...], int]]:
        """Layers counted by what of them is in FP8."""
        if not self._fp8_names:
            return [((), len(layers))]
        return list(Counter(self._fp8_names[layers.start : layers.stop]).items())

    def parameters(self, rank: int) -> int:
        """On a rank of this pipeline rank."""
        count = sum(map(len, self.chunks[rank])) * self._layer_parameters
        if rank == 0:
            count += f.first_parameters(self.section, self.axes.tp) + self.extra_first
        if rank == self.axes.pp - 1:
            count += f.last_parameters(self.section, self.out_dim, self.head_bias)
        return count

    @cached_property
    def _layer_parameters(self) -> int:
        return f.layer_parameters(self.section, self.axes.tp)

    def fp8_bytes(self, rank: int) -> int:
        """Of copies of weights."""
        if not self._fp8_names:
            return 0
        sizes = {name: i * o for name, (i, o) in features_on_rank(self.section, self.axes.tp).items()}
        kinds = [kind for chunk in self.chunks[rank] for kind in self.kinds(chunk)]
        return f.fp8_weight_bytes(sum(number * sizes[name] for names, number in kinds for name in names))

    # ------------------------------------------------------------------------------------------------ activations

    @cached_property
    def _kept(self) -> dict[tuple[Fp8Linear, ...], int]:
        """Bytes that a layer keeps, by what of it is in FP8."""
        selective = self.axes.recompute == "selective"
        kinds = self.kinds(range(self.section.num_layers))
        return {kind: f.layer_kept_bytes(self.section, self.work, kind, selective) for kind, _ in kinds}

    @cached_property
    def kept(self) -> list[int]:
        """Of each pipeline rank, for all its microbatches in flight at the most."""
        return [self.kept_on(rank) for rank in range(self.axes.pp)]

    def kept_on(self, rank: int) -> int:
        """One of `kept`."""
        boundary = f.layer_input_bytes(self.section, self.work)
        costs = []
        for index, chunk in enumerate(self.chunks[rank]):
            again = self._num_recomputed(chunk)
            cost = again * boundary + sum(self._kept[kind] * number for kind, number in self.kinds(chunk[again:]))
            if rank == 0 and index == 0:
                cost += f.embedding_bytes(self.section, self.work)
            last = rank == self.axes.pp - 1 and index == self.axes.vpp - 1
            if not last:  # the output for the next stage, which mcore's schedules keep
                cost += boundary
            elif self.name != "student":
                cost += f.ending_bytes(self.section, self.work)
            costs.append(cost)
        return f.warmup_depth(costs, self.axes.pp, rank, self.microbatches)

    def backward_work(self, rank: int) -> int:
        """Beside what is kept. A layer that is recomputed is whole again for its backward pass; where its chunk's last
        layers are not, what they kept, at least one layer's, has been freed by then. What a student's loss takes is
        gone when its last layer begins."""
        whole = any(chunk and self._num_recomputed(chunk) == len(chunk) for chunk in self.chunks[rank])
        again = max(self._kept.values()) if whole else 0
        most = again + self._backward_work
        if self.name == "student" and rank == self.axes.pp - 1:
            assert isinstance(self.section, VisionSection)
            masked = self.out_rows * self.work.sequences
            # The gradient of the stream is a view of the whole sequence's.
            most += (self.work.rows - self.work.own_rows) * self.section.hidden_size * self.work.number
            most = max(most, f.distillation_bytes(self.section, self.work, masked, self.out_dim))
        return most

    def backward_peak(self, rank: int) -> int:
        """The most that a backward pass holds, what was kept for it included."""
        most = self.kept_on(rank) + self.backward_work(rank)
        return most if rank else max(most, f.embedding_gradient_bytes(self.section, self.work))

    @cached_property
    def _backward_work(self) -> int:
        return f.backward_bytes(self.section, self.work)

    @cached_property
    def gathered(self) -> int:
        """Of the buffer for the sequence that a column linear gathers; none for frozen weights, see `forward_work`."""
        return self.trained * f.gathered_bytes(self.section, self.work, self.axes.tp_comm_overlap)

    @cached_property
    def forward_work(self) -> int:
        """Of a pass without gradients."""
        edge = f.embedding_bytes(self.section, self.work, backward=False)
        if self.name == "teacher" and isinstance(self.section, VisionSection):  # its frame holds embeddings of patches
            edge += self.section.num_patches * self.work.sequences * self.section.hidden_size * self.work.number
        return edge + f.forward_bytes(self.section, self.work, not self.trained)

    def _num_recomputed(self, chunk: range) -> int:
        mode = self.axes.recompute
        return len(chunk) if mode == "full" else 0 if isinstance(mode, str) else min(mode, len(chunk))

    @property
    def rows(self) -> int:
        """Sequences of the data rank in a step."""
        return self.work.sequences * self.microbatches

    # -------------------------------------------------------------------------------------------------------- FLOPs

    @property
    def flops(self) -> tuple[int, int]:
        """(forward, forward and backward) of one sequence, nothing computed twice."""
        return f.tower_flops(self.section, self.work.tokens, self.out_dim, self.out_rows)

    def executed_flops(self, forward_passes: int) -> int:
        """Of one sequence that goes forward so often without gradients, and if the tower is trained forward and
        backward, with what is recomputed."""
        once, both = self.flops
        if not self.trained:
            return forward_passes * once
        linears, attention = f.layer_flops(self.section, self.work.tokens)
        again = sum(self._num_recomputed(chunk) for chunks in self.chunks for chunk in chunks) * (linears + attention)
        if self.axes.recompute == "selective":
            again = self.section.num_layers * attention
        return forward_passes * once + both + again

    def rank_flops(self, rank: int) -> int:
        """Executed by a rank of this pipeline rank on a microbatch: forward, and if the tower is trained backward, with
        what is recomputed. Padding of sequence parallelism counts in the linears."""
        linears, attention = f.layer_flops(self.section, self.work.tokens)
        layer = linears * self.work.rows // (self.work.tokens * self.work.sequences) + attention
        products = 3 if self.trained else 1
        total = products * sum(map(len, self.chunks[rank])) * layer
        if self.trained:
            again = sum(map(self._num_recomputed, self.chunks[rank])) * layer
            total += sum(map(len, self.chunks[rank])) * attention if self.axes.recompute == "selective" else again
        total //= self.axes.tp
        if rank == 0:
            total += (2 if self.trained else 1) * f.first_flops(self.section)
        if rank == self.axes.pp - 1:
            total += products * f.last_flops(self.section, self.out_dim, self.out_rows)
        return total * self.work.sequences

    # ------------------------------------------------------------------------------------------------------ seconds

    def stage_seconds(self, gpu: Gpu) -> tuple[Seconds, Seconds, Seconds]:
        """(forward, backward, computed again) of a microbatch on the pipeline rank that takes longest."""
        overlap = self.axes.tp_comm_overlap
        kinds = self.kinds(range(self.section.num_layers))
        of_kind = {kind: f.layer_seconds(self.section, self.work, gpu, kind, overlap) for kind, _ in kinds}
        ranks = [self._rank_seconds(rank, gpu, of_kind) for rank in range(self.axes.pp)]
        return max(ranks, key=lambda times: sum(part.total for part in times))

    def _rank_seconds(
        self, rank: int, gpu: Gpu, of_kind: dict[tuple[Fp8Linear, ...], tuple[Seconds, Seconds]]
    ) -> tuple[Seconds, Seconds, Seconds]:
        forward = backward = again = Seconds()
        for chunk in self.chunks[rank]:
            recomputed = self._num_recomputed(chunk)
            for kind, number in self.kinds(chunk):
                there, back = of_kind[kind]
                forward, backward = forward + there * number, backward + back * number
                if self.axes.recompute == "selective":
                    again = again + Seconds(attention=there.attention) * number
            for kind, number in self.kinds(chunk[:recomputed]):
                again = again + of_kind[kind][0] * number
        ends = 0.0
        if rank == 0:
            ends += f.first_flops(self.section)
        if rank == self.axes.pp - 1:
            ends += f.last_flops(self.section, self.out_dim, self.out_rows)
        if ends:
            one = f.ends_seconds(gpu, ends * self.work.sequences, self.work.precision, self.section.hidden_size)
            forward, backward = forward + one, backward + one * 2
        return forward, backward, again


@lru_cache(maxsize=64)
def _names_in_fp8(section: VisionSection | TextSection, tp: int, fp8: Fp8Section) -> list[tuple[Fp8Linear, ...]]:
    layers = range(section.num_layers)
    return [tuple(name for name in NAMES if in_fp8(section, tp, fp8, layer, name)) for layer in layers]
