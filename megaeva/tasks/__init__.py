"""Tasks: what is trained, on which loss."""

from megaeva.config.schema import Config
from megaeva.parallel.runtime import Runtime
from megaeva.tasks.base import Task
from megaeva.tasks.transfers import overlap_transfers


def build_task(cfg: Config, runtime: Runtime) -> Task:
    """The task the recipe names, with its weights loaded. All ranks call it."""
    overlap_transfers(cfg, runtime)
    if cfg.task == "mim":
        from megaeva.tasks.mim import MIM

        return MIM(cfg, runtime)
    from megaeva.tasks.contrastive import Contrastive

    return Contrastive(cfg, runtime)
