"""Ways to spread a training step over ranks and passes, each with the single process it must equal."""

from dataclasses import dataclass
from math import lcm

from megaeva.config.schema import AxesSection

NUM_SAMPLES = 8
"""Samples of a global batch, unless a layout says otherwise."""


_ONE = AxesSection()


@dataclass(frozen=True)
class Layout:
    """How a step is spread.

    Attributes:
        vision: of the vision tower, or the student.
        second: of the text tower, or the teacher.
        microbatches: passes of one vision data rank in a step.
        drop_path: 0 where the passes are compared with fewer, larger ones.
        distributed_optimizer, overlap: of gradients and of parameters; as in the recipe.
        num_samples: of a global batch.
        num_layers, num_heads: of the vision tower, whose widths follow the heads.
        plain_blocks: a single process that stands for this many data blocks; it computes the step by definition,
            without schedules (`parallel_runs.plain_step`). None: the product's step.
    """

    name: str
    num_ranks: int = 1
    vision: AxesSection = _ONE
    second: AxesSection = _ONE
    microbatches: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    drop_path: float = 0.1
    num_samples: int = NUM_SAMPLES
    num_layers: int = 4  # enough for pp=2 with vpp=2
    num_heads: int = 4
    plain_blocks: int | None = None

    @property
    def num_blocks(self) -> int:
        """Data blocks: each reads samples of its own."""
        return self.plain_blocks or self.num_ranks // lcm(self.vision.tp * self.vision.pp, self.second.tp)

    @property
    def num_passes(self) -> int:
        """Passes of the vision tower in a step, over all data ranks."""
        return self.num_ranks // (self.vision.tp * self.vision.pp) * self.microbatches

    @property
    def reference(self) -> "Layout":
        """The single process to compare with: the same passes, or one pass where nothing is random."""
        sizes = {name: getattr(self, name) for name in ("num_samples", "num_layers", "num_heads")}
        if self.drop_path == 0.0:
            return Layout("one batch", drop_path=0.0, plain_blocks=1, **sizes)
        name = f"{self.num_blocks} x {self.num_passes // self.num_blocks} passes"
        return Layout(name, microbatches=self.num_passes, plain_blocks=self.num_blocks, **sizes)


def _axes(tp: int = 1, pp: int = 1, vpp: int = 1, **other: object) -> AxesSection:
    return AxesSection.model_validate({"tp": tp, "pp": pp, "vpp": vpp, **other})


_TP2, _SP2 = _axes(2), _axes(2, sequence_parallel=True)
LAYOUTS = (
    Layout("one_rank"),
    Layout("accumulate4", microbatches=4),
    Layout("accumulate4_against_one_batch", microbatches=4, drop_path=0.0),
    Layout("recompute_selective", 1, _axes(recompute="selective"), _axes(recompute="selective")),
    Layout("recompute_full", 1, _axes(recompute="full"), _axes(recompute="full")),
    Layout("recompute_2_layers", 1, _axes(recompute=2), _axes(recompute=1)),
    Layout("tp2", 2, _TP2, _TP2),
    Layout("tp2_sp", 2, _SP2, _SP2),
    Layout(
        "tp2_sp_accumulate2_recompute_full",
        2,
        _axes(2, sequence_parallel=True, recompute="full"),
        _axes(2, sequence_parallel=True, recompute="full"),
        microbatches=2,
    ),
    Layout("pp2", 2, _axes(pp=2)),
    Layout("pp2_accumulate4", 2, _axes(pp=2), microbatches=4),
    Layout("pp2_accumulate4_recompute_full", 2, _axes(pp=2, recompute="full"), microbatches=4),
    Layout("pp2_accumulate4_against_one_batch", 2, _axes(pp=2), microbatches=4, drop_path=0.0),
    Layout("pp2_vpp2_accumulate4", 2, _axes(pp=2, vpp=2), microbatches=4),
    Layout("pp2_uneven_accumulate2", 2, _axes(pp=2, layers_per_stage=(1, 3)), microbatches=2),
    Layout("dp2", 2, distributed_optimizer=True),
    Layout("dp2_accumulate2_recompute_selective", 2, _axes(recompute="selective"), microbatches=2),
    Layout("vision_tp2_second_tp1", 2, _TP2),
    Layout("vision_tp1_second_tp2", 2, second=_TP2),
    Layout("vision_tp1_second_tp2_accumulate2", 2, second=_TP2, microbatches=2),
    Layout("vision_pp2_second_tp2", 2, _axes(pp=2), _TP2, microbatches=2),
    Layout("tp2_pp2", 4, _axes(2, 2), _TP2),
    Layout("tp2_sp_pp2_accumulate4", 4, _axes(2, 2, sequence_parallel=True), _SP2, microbatches=4),
    Layout("tp2_dp2", 4, _TP2, _TP2, distributed_optimizer=True, overlap=True),
    Layout("tp2_sp_dp2", 4, _SP2, _SP2, distributed_optimizer=True),
    Layout("pp2_vpp2_dp2_accumulate2", 4, _axes(pp=2, vpp=2), microbatches=2, distributed_optimizer=True),
    Layout("dp4", 4, distributed_optimizer=True, overlap=True),
    Layout("pp4_accumulate4", 4, _axes(pp=4), microbatches=4),
    Layout("pp4_vpp2_accumulate4", 4, _axes(pp=4, vpp=2), microbatches=4, num_layers=8),
)
