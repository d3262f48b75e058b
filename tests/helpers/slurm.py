"""srun, scancel, scontrol as shell scripts: nodes that are processes of this machine, for recipes/train_slurm.sh."""

import os
import socket
from pathlib import Path

# What both begin with: signals all processes below one, in whatever session they are.
_BELOW = """#!/bin/bash
below() { local child; for child in $(pgrep -P "$2"); do below "$1" "$child"; kill "-$1" "$child" 2>/dev/null; done; }
"""
_SRUN = """
# A task on each node; one that fails ends the others. SIGTERM kills them all, as srun does ("forcing job termination").
[[ "$1 $2 $3" == "--nodes=$SLURM_NNODES --ntasks-per-node=1 --kill-on-bad-exit=1" ]] || exit 99
shift 3
echo $$ > "$FAKE_STEP"
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_STEP_NUM_NODES=$SLURM_NNODES "$@" & tasks+=($!)
done
trap 'below KILL $$; exit 137' TERM
code=0
for ((left = SLURM_NNODES; left > 0; left--)); do
    one=0
    wait -n || one=$?
    if [[ $one -ne 0 && $code -eq 0 ]]; then
        code=$one
        [[ $one -gt 128 ]] || kill -TERM "${tasks[@]}" 2>/dev/null
    fi
done
exit $code
"""
_SCANCEL = """
# A signal other than KILL goes to every process of the steps, not to the batch script.
[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] || exit 1
below TERM "$(cat "$FAKE_STEP")"
"""
_SCONTROL = """#!/bin/bash
case "$1" in
    show)
        [[ "$2 $3" == "hostnames $SLURM_JOB_NODELIST" ]] || exit 1
        [[ -n "$FAKE_HOSTS" ]] || exit 0
        # More than a pipe holds: who reads only the first ends this early.
        printf '%s\\n' $FAKE_HOSTS gpu-of-many-{1..9999} ;;
    requeue) echo "$2" >> "$FAKE_REQUEUED"; exit "${FAKE_REQUEUE_CODE:-0}" ;;
esac
"""


def write_commands(folder: Path, **scripts: str) -> None:
    """A program of each name in `folder`, which a test puts into PATH."""
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def fake_slurm(folder: Path, repository: Path, nnodes: int) -> dict[str, str]:
    """The environment of a batch script's node in a job of `nnodes`; requeued jobs are listed in `folder`/requeued."""
    write_commands(folder, srun=_BELOW + _SRUN, scancel=_BELOW + _SCANCEL, scontrol=_SCONTROL)
    return {
        "SLURM_JOB_ID": "77", "SLURM_NNODES": str(nnodes), "SLURM_JOB_NODELIST": f"gpu[1-{nnodes}]",
        "SLURM_SUBMIT_DIR": str(repository), "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE_HOSTS": " ".join([socket.gethostname()] * nnodes), "FAKE_REQUEUED": str(folder / "requeued"),
        "FAKE_STEP": str(folder / "step"),
    }  # fmt: skip
