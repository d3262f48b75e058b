"""torchrun with its verdict written to a file: `python -m megaeva.loop.agent FAILURE_FILE [torchrun arguments]`.

torchrun knows which rank died first and tells it only in prose. This entry calls the same code and writes that rank's
number, exit code and message as JSON, so that the loop can name it without reading logs.
"""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaeva.errors import LOST_PEER


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 1 after a rank died, 128 + signal after a signal. Runs once on each node, before any rank."""
    # Imported here: the loop reads this file's name without paying for torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    failure_file, *torchrun_arguments = argv
    try:
        run(parse_args(torchrun_arguments))
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _suspicion(item[1]))
        message = _message(failure)
        record = {"rank": rank, "exit_code": failure.exitcode, "pid": failure.pid, "message": message}
        Path(failure_file).write_text(json.dumps(record), encoding="utf-8")
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _suspicion(failure: Any) -> tuple[int, int]:
    """Sorts failures: the first is the cause. Times alone cannot tell, they are whole seconds.

    A rank that was killed comes before ranks that raised, and those that lost their connection to it come last.
    """
    if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM: how torchrun stops the others
        return 0, failure.timestamp
    lost = failure.exitcode == LOST_PEER or ("peer" in (text := _message(failure)) and "onnection" in text)
    return 2 if lost or failure.exitcode == -signal.SIGTERM else 1, failure.timestamp


def _message(failure: Any) -> str:
    message = failure.message
    return str(message["message"] if isinstance(message, dict) else message)  # a dict where main is a `record`


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
