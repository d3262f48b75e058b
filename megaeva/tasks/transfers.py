"""The buffers of `parallel.vision.tp_comm_overlap`, for the one shape that a step's passes have."""

from megaeva.config.schema import Config
from megaeva.config.topology import microbatches, num_kept
from megaeva.errors import UserError
from megaeva.model.layer_specs import DTYPES
from megaeva.parallel.runtime import Runtime


def overlap_transfers(cfg: Config, runtime: Runtime) -> None:
    """Makes Transformer Engine's buffers if the recipe asks for them, before any tower is built. All ranks call it.

    Passes of another shape do without: evaluation, a phase with other patch dropout, a smaller last microbatch.

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

    num_tokens = 1 + num_kept(vision.num_patches, vision.patch_dropout)
    start_overlap(
        length=-(-num_tokens // axes.tp) * axes.tp,
        batch=microbatches(cfg, axes, runtime.world_size)[0],
        hidden_size=vision.hidden_size,
        tp_size=axes.tp,
        dtype=DTYPES[cfg.train.parameter_precision],
        fp8=cfg.train.fp8_in_use,
    )
