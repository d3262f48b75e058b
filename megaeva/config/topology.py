"""How a recipe cuts its towers over ranks: arithmetic on sizes, without torch or a process group.

Ranks are numbered tp fastest, then pp, then dp. So a tower of tp x pp = M has its data rank d on ranks d*M .. d*M+M-1.
"""

from math import lcm

from megaeva.config.problem import divisors
from megaeva.config.schema import AxesSection, Config


def virtual_stages(axes: AxesSection, num_layers: int) -> tuple[range, ...]:
    """Layers of each virtual pipeline stage in order of depth, `axes.pp * axes.vpp` ranges of layer numbers from 0.

    Virtual stage v runs on pipeline rank v % pp, as that rank's chunk v // pp. Without `axes.layers_per_stage` layers
    are shared out evenly; what is left over goes to the middle stages, as the first also embeds and the last projects.
    """
    sizes = axes.layers_per_stage or _even(num_layers, axes.pp * axes.vpp)
    starts = [sum(sizes[:v]) for v in range(len(sizes))]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    base, left = divmod(num_layers, num_stages)
    by_distance_to_middle = sorted(range(num_stages), key=lambda v: (abs(2 * v - num_stages + 1), v))
    heavier = set(by_distance_to_middle[:left])
    return tuple(base + (v in heavier) for v in range(num_stages))


PARALLEL_KEYS = {"vision": "vision", "text": "text", "student": "vision", "teacher": "teacher"}
"""The section of `parallel` that spreads each module of `step_axes`."""


def step_axes(cfg: Config) -> dict[str, AxesSection]:
    """The axes of each module that runs in a step, by name: vision and text, or student and teacher."""
    if cfg.task == "mim":
        return {"student": cfg.parallel.vision, "teacher": cfg.parallel.teacher}
    return {"vision": cfg.parallel.vision, "text": cfg.parallel.text}


def grid_axes(cfg: Config) -> dict[str, AxesSection]:
    """The axes of every grid of a run: those of `step_axes`, "data" and, beside a text tower, "scale".

    "data" has the data blocks (see `sharing_ranks`) as its data ranks and the ranks of a block as its tp; the logit
    scale is whole on every rank.
    """
    axes = step_axes(cfg) | {"data": AxesSection(tp=sharing_ranks(cfg))}
    return axes | {"scale": AxesSection()} if cfg.task == "contrastive" else axes


def data_ranks(axes: AxesSection, world_size: int) -> int:
    """Copies of a tower on these axes, each with its own share of the batch; 0 if there are too few processes."""
    return world_size // (axes.tp * axes.pp)


def microbatches(cfg: Config, axes: AxesSection, world_size: int, frames: int = 1) -> tuple[int, int]:
    """(samples of the largest, passes) of one data rank of the tower on `axes`: its share of the global batch in parts.

    As few parts as train.micro_batch_size allows (null: one), alike to one sample. For the vision tower `check_world`
    has seen to it that the key divides the share. The key counts images: of videos, a sample is `frames` of them, and
    the parts shrink, still of one size, to hold no more images than before, or to one sample.
    """
    share = cfg.train.global_batch_size // data_ranks(axes, world_size)
    passes = -(-share // (cfg.train.micro_batch_size or share))
    if frames > 1 and cfg.train.micro_batch_size is not None:
        most = max(cfg.train.micro_batch_size, frames)
        passes = next(n for n in divisors(share) if n % passes == 0 and share // n * frames <= most)
    return -(-share // passes), passes


def sharing_ranks(cfg: Config) -> int:
    """Neighbouring ranks that read the same samples: the smallest block made of whole data ranks of every tower.

    Within it each tower's data ranks take their own slice of those samples.
    """
    return lcm(*(axes.tp * axes.pp for axes in step_axes(cfg).values()))


def num_kept(num_patches: int, patch_dropout: float) -> int:
    """How many patches survive dropout: max(1, int(N * (1 - patch_dropout)))."""
    return max(1, int(num_patches * (1 - patch_dropout)))
