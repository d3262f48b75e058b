#!/usr/bin/env bash
# One node of a training job; the same command on every node.
#
#   recipes/train.sh [--dry-run] RECIPE [--resume] [key.path=value ...]                  one node, all its GPUs
#   NNODES=4 NODE_RANK=0..3 MASTER_ADDR=node0 PROCESSES=8 recipes/train.sh RECIPE ...    on each of four nodes
#
# --dry-run prints what would run. All variables: megaeva/loop/node.py. SIGTERM saves and ends with 143; --resume goes on.
# A node that was lost may be started again with --resume: the others wait for it (JOIN_SECONDS) and go on from the last
# checkpoint. If node 0 is lost, start all again.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }

recipe=""
for argument in "$@"; do
    case "$argument" in
        --dry-run | --resume) ;;
        -*) fail "$argument is no option of $0; options are --dry-run and --resume; settings are written key.path=value." ;;
        *=*) ;;
        *) recipe="$argument" ;;
    esac
done
[[ -n "$recipe" ]] || fail "no RECIPE is given; a YAML file must be; usage: $0 [--dry-run] RECIPE [--resume] [key.path=value ...]"
[[ -r "$recipe" ]] || fail "RECIPE=$recipe cannot be read in $PWD; it must be a file on every node; look at the path and the mounts."

python="${PYTHON:-python}"
command -v "$python" >/dev/null || fail "PYTHON=$python is no command here; it must be megaeva's interpreter, on every node; set PYTHON=/path/to/.venv/bin/python."
missing=$("$python" -c '
import importlib.util, sys
wrong = [] if sys.version_info >= (3, 11) else ["Python 3.11 (it is %d.%d)" % sys.version_info[:2]]
print(", ".join(wrong + [name for name in ("megaeva", "torch", "megatron") if importlib.util.find_spec(name) is None]))
') || fail "PYTHON=$python does not run on $(hostname); it must be megaeva's interpreter; set PYTHON=/path/to/.venv/bin/python."
[[ -z "$missing" ]] || fail "PYTHON=$python lacks $missing on $(hostname); megaeva must be installed there; see README.md, or set PYTHON=/path/to/.venv/bin/python."

# In place of this shell, so that a signal reaches torchrun once.
exec "$python" -m megaeva.loop.node "$@"
