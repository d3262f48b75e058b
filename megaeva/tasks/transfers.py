"""The buffers of `parallel.vision.tp_comm_overlap`, for the one shape that a step's passes have."""

from megaeva.config.phases import run_phases
from megaeva.config.schema import Config
from megaeva.config.topology import microbatches, num_kept
from megaeva.errors import UserError
from megaeva.parallel.platform import DTYPES
from megaeva.parallel.runtime import Runtime


def overlap_transfers(cfg: Config, runtime: Runtime) -> None:
    """Makes Transformer Engine's buffers if the recipe asks for them, before any tower is built. All ranks call it.

    Passes of another shape than `training_shape` do without: evaluation, phases with other patch dropout or frames.

    Raises:
        UserError: asked for, and this is a CPU.
    """
    axes, vision = cfg.parallel.vision, cfg.model.vision
    if not axes.tp_comm_overlap:
        return
    if runtime.layer_spec != "te":
        raise UserError(
            "parallel.vision.tp_comm_overlap=true needs GPUs, whose transfers Transformer Engine overlaps, and this "
            f"runs on {runtime.device.type}; remove it, or start on a machine with GPUs."
        )
    from megaeva.model.transformer_engine import start_overlap

    length, batch = training_shape(cfg, runtime.world_size)
    start_overlap(
        length=length,
        batch=batch,
        hidden_size=vision.hidden_size,
        tp_size=axes.tp,
        dtype=DTYPES[cfg.train.parameter_precision],
        fp8=cfg.train.fp8_in_use,
    )


def training_shape(cfg: Config, world_size: int) -> tuple[int, int]:
    """(tokens, padded to a multiple of tp, images) of the vision tower's microbatches in the phase with most steps."""
    phase = max(run_phases(cfg), key=lambda phase: phase.steps).cfg
    axes, vision, frames = phase.parallel.vision, phase.model.vision, phase.data.frames
    num_tokens = 1 + num_kept(vision.num_patches, vision.patch_dropout)
    return -(-num_tokens // axes.tp) * axes.tp, microbatches(phase, axes, world_size, frames)[0] * frames
