"""`megaeva bench`, for a checkout whose command is not on the path: python tools/benchmark.py sweep RECIPE."""

import sys

from megaeva.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="megaeva")
