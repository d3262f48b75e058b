"""torchrun -m megaeva.train RECIPE [--resume] [key.path=value ...]

The entry point of every training process, under torchrun or alone. Exit codes: 0 finished, 2 a mistake in the recipe,
data or checkpoint (explained on stderr, once for all ranks), 3 another rank hangs or is gone (named on stderr by one of
the others), 130 and 143 stopped by Ctrl-C and SIGTERM with a checkpoint written.
"""

import argparse
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

from megaeva.errors import explain_end

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: Sequence[str] | None = None) -> int:
    """Train from a recipe; returns the exit code. Every rank of a job calls it with the same arguments."""
    parser = argparse.ArgumentParser(prog="python -m megaeva.train", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML recipe, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set on top of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's newest checkpoint")
    options = parser.parse_intermixed_args(argv)
    _die_with_agent()
    return explain_end(lambda: train(options.recipe, options.overrides, resume=options.resume))


def train(recipe: str, overrides: Sequence[str], *, resume: bool) -> int:
    """Train from a recipe; returns the exit code: 0, or 128 + signal after a signal and a save. All ranks call it.

    Raises:
        UserError: a mistake in the recipe, data or checkpoint.
    """
    from megaeva.config import check_world, diff_from_base, load
    from megaeva.config.world import check_world_size

    check_world_size(os.environ)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    cfg = load(recipe, overrides, processes)
    check_world(cfg, processes)
    # Imported here: mistakes in the recipe are told before torch is loaded.
    from megaeva.parallel import watch
    from megaeva.parallel.runtime import start, stop
    from megaeva.trainer import Trainer

    runtime = start(cfg.platform, cfg.train.timeout_minutes)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megaeva").setLevel(logging.INFO if runtime.is_main else logging.ERROR)
    try:
        changes = diff_from_base(recipe, overrides)
        with watch.explaining(runtime):
            return Trainer(cfg, runtime, resume=resume, recipe_changes=changes).fit()
    finally:
        stop()


def _die_with_agent() -> None:
    """From now on this rank is killed when torchrun's agent dies, of which nobody else would tell it.

    It would wait for its node's place to be taken by others, and hold the GPU. Linux only.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(main)())
