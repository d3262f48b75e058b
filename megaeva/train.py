"""torchrun -m megaeva.train RECIPE [--resume] [key.path=value ...]

The entry point of every training process, under torchrun or alone. Exit codes: 0 finished, 2 a mistake in the recipe,
data or checkpoint (explained on stderr), 143 stopped by SIGTERM with a checkpoint written.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from megaeva.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Train from a recipe; returns the exit code. Every rank of a job calls it with the same arguments."""
    parser = argparse.ArgumentParser(prog="python -m megaeva.train", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML recipe, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set on top of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's newest checkpoint")
    options = parser.parse_intermixed_args(argv)

    from megaeva.config import load

    try:
        cfg = load(options.recipe, options.overrides)
        from megaeva.config import diff_from_base
        from megaeva.parallel.runtime import start, stop
        from megaeva.trainer import Trainer

        runtime = start(cfg.platform)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("megaeva").setLevel(logging.INFO if runtime.is_main else logging.ERROR)
        try:
            changes = diff_from_base(options.recipe, options.overrides)
            return Trainer(cfg, runtime, resume=options.resume, recipe_changes=changes).fit()
        finally:
            stop()
    except UserError as error:
        # torchrun runs this on every rank; each says its own part once.
        rank = os.environ.get("RANK")
        print(f"{f'rank {rank}: ' if rank not in (None, '0') else ''}error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(main)())
