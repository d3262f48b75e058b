"""torchrun with its verdict written to a file: `python -m megaeva.loop.agent FAILURE_FILE [torchrun arguments]`.

torchrun knows which rank died first and tells it only in prose. This entry calls the same code and writes that rank's
number, exit code and message as JSON, so that the loop can name it without reading logs.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


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
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):  # a rank whose main is decorated with torch's `record`
            message = message["message"]
        record = {"rank": rank, "exit_code": failure.exitcode, "pid": failure.pid, "message": message}
        Path(failure_file).write_text(json.dumps(record), encoding="utf-8")
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
