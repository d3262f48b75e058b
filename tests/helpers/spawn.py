"""Real processes for tests of what happens between ranks.

They are forked by a server that has imported torch, megatron-core and megaeva: a rank that imported them anew would
spend five seconds of CPU, more than most jobs. The server is multiprocessing's, imports and forks, and has one thread;
what a job needs beyond imports (the shim, threads, process groups) happens in its ranks. They share one hash seed,
which ranks of a real job do not: an order that comes from a set shows in the tests that run `megaeva train`.
"""

import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

_ROOT = Path(__file__).parents[2]
# With all that they import. A module that does not import here is left to the ranks, which say so.
_IMPORTED_ONCE = ["megaeva.trainer"]


def _run(
    rank: int,
    num_ranks: int,
    port: int,
    environment: dict[str, str],
    target: tuple[str, str, str],
    payload: bytes,
    pipe: Connection,
) -> None:
    os.environ.clear()  # the server's, which is as old as the first job
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # The parent owns the store, so no port is picked and lost between two processes.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    try:
        import torch

        torch.set_num_threads(1)
        from megaeva.parallel import runtime

        # By file: under --import-mode=importlib a test module is not importable by name.
        name, file, qualname = target
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        function = getattr(sys.modules[name], qualname)
        args = pickle.loads(payload)
        this = runtime.start("cpu", timeout_minutes=1)
        result = function(this, *args)
        dist.barrier()
        pipe.send_bytes(pickle.dumps((True, result)))
        runtime.stop()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None


def _server() -> Any:
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))  # handed to the child, which must import this file
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


class TrainingProcess:
    """`python -m megaeva.train ARGUMENTS` that has begun, without the seconds of its imports.

    Args:
        arguments: of its command line.
        folder: of the files that it prints to.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._printed = tuple(Path(tempfile.mkstemp(suffix, "printed_", folder)[1]) for suffix in (".out", ".err"))
        self._process = _server().Process(target=_train, args=(dict(os.environ), list(arguments), self._printed))
        self._process.start()

    def kill(self, signum: signal.Signals) -> None:
        """Sends a signal."""
        os.kill(self._process.pid, signum)

    def finish(self, timeout: float = 100) -> tuple[int, str, str]:
        """Its exit code, negative for a signal, and what it printed to stdout and stderr.

        Raises:
            AssertionError: it did not end within `timeout` seconds; it is killed.
        """
        self._process.join(timeout)
        if ended_too_late := self._process.is_alive():
            self._process.kill()
            self._process.join()
        out, err = (file.read_text() for file in self._printed)
        assert not ended_too_late, f"it did not end within {timeout:g} s: {out}{err}"
        return self._process.exitcode, out, err


def _train(environment: dict[str, str], arguments: list[str], printed: tuple[Path, Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(printed, 1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    from megaeva.train import main

    sys.exit(main(arguments))


def run_ranks(fn: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 110) -> list[Any]:
    """Returns what `fn(runtime, *args)` returned on ranks 0..num_ranks-1, each a process with one thread on gloo.

    Args:
        fn: a top-level function of a test module.
        args: picklable; results too.
        timeout: seconds until all processes are killed.

    Raises:
        AssertionError: a rank failed (with its traceback), died, or did not end in time. No process is left behind.
    """
    assert fn.__qualname__.isidentifier(), "a top-level function, as the child looks it up by name"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    target = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
    context = _server()
    pipes: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server loads torch
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run,
                args=(rank, num_ranks, store.port, dict(os.environ), target, pickle.dumps(args), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        deadline = time.monotonic() + timeout
        while pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pipes), timeout=left):
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died without a word"
                (results if ok else failures)[rank] = value
                if not ok:  # the others may wait for it in a collective: a moment for their own report, no more
                    deadline = min(deadline, time.monotonic() + 3)
        if not failures:
            failures = dict.fromkeys(pipes.values(), f"did not end within {timeout:g} s")
        for process in processes:
            process.join(timeout=0 if failures else 10)
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if failures:
        texts = [f"rank {rank} of {num_ranks}: {text}" for rank, text in sorted(failures.items())]
        raise AssertionError("\n".join(texts))
    return [results[rank] for rank in range(num_ranks)]
