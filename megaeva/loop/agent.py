"""torchrun with its verdict written to a file: `python -m megaeva.loop.agent FAILURE_FILE [torchrun arguments]`.

torchrun knows which rank died first and tells it only in prose. This entry calls the same code and writes that rank's
number, exit code and message as JSON, so that the loop can name it without reading logs. With --log-dir each start of
the ranks has its output in a folder LOG_DIR/start_N of its own, N counting on over restarts and over agents.
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
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failure_file, *torchrun_arguments = argv
    # torchrun's own name for this class; --logs-specs takes only what an installed package declares.
    torchrun.DefaultLogsSpecs = _logs_of_every_start()  # type: ignore[misc]
    try:
        torchrun.run(torchrun.parse_args(torchrun_arguments))
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: _suspicion(item[1]))
        message = _message(failure)
        record = {"rank": rank, "exit_code": failure.exitcode, "pid": failure.pid, "message": message}
        Path(failure_file).write_text(json.dumps(record), encoding="utf-8")
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _logs_of_every_start() -> Any:
    """torchrun's class of log files, where a start for a node that came back would overwrite the one before it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    class Logs(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> Any:
            self._run_log_dir = None  # so that super asks for a folder
            return super().reify(envs)

        def _make_log_dir(self, log_dir: str | None, rdzv_run_id: str) -> str:
            if not log_dir:
                return super()._make_log_dir(log_dir, rdzv_run_id)
            number = 1
            while True:
                folder = Path(log_dir) / f"start_{number}"
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    number += 1
                else:
                    return str(folder)

    return Logs


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
