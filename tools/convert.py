"""`megaeva convert`, for a checkout whose command is not on the path: python tools/convert.py SRC DST --to FORMAT."""

import sys

from megaeva.cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]], prog_name="megaeva")
