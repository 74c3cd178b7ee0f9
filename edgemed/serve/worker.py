"""Inference in processes of their own: `python -P -m edgemed.serve.worker DEVICE THREADS`, started by `Worker`.

A job comes as a JSON line on stdin; the reply is one JSON line: the files that were written, or the error. The line
"stop", and the end of stdin, ask it to stop between two slices. A process that dies fails the one job it had; the next
job starts a fresh one. Nothing is pickled; what libraries print goes nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgemed import errors
from edgemed.errors import EdgemedError, OutOfMemory, Timeout
from edgemed.serve.settings import NodeSettings, Rule
from edgemed.serve.work import Process, Stopped

_POLL_SECONDS = 0.2
_TUPLES = ("kinds", "targets", "senders")


def devices_of(settings: NodeSettings) -> tuple[str, ...]:
    """Return the device of each worker: those of the settings, else each GPU that onnxruntime can use, else one."""
    if settings.workers:
        return settings.workers
    from importlib.metadata import PackageNotFoundError, version

    from edgemed.nvidia import ask_driver

    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return ("auto",)
    driver = ask_driver()
    return tuple(f"gpu:{gpu.index}" for gpu in driver.gpus) if driver and driver.gpus else ("auto",)


def open_workers(settings: NodeSettings) -> list[Worker]:
    """Return the workers of a node; their processes start with their first jobs."""
    devices = devices_of(settings)
    # Each library would otherwise take every core for each process.
    threads = 0 if len(devices) == 1 else max(1, (os.cpu_count() or 1) // len(devices))
    return [Worker(device, threads, seconds=settings.job_seconds) for device in devices]


class Worker:
    """Answers studies in a child process; see `edgemed.serve.work.Process`. Not for use from several threads.

    threads: of the CPU, 0 for all. seconds: what a job may take. command: what is run instead of `main`.
    """

    def __init__(
        self, device: str = "auto", threads: int = 0, *, seconds: float = 7200.0, command: Sequence[str] = ()
    ) -> None:
        # -P: a folder named like a module, where the node was started, must never be imported.
        self._command = [*(command or (sys.executable, "-P", "-m", __name__)), device, str(threads)]
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def __call__(self, rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        """Return the files. Raises what answering raised, Timeout, or EdgemedError where the process died."""
        child = self._started()
        self._write(child, json.dumps({"rule": asdict(rule), "study": str(study), "out": str(out)}))
        told = self._reply(child, stopping)
        if "error" not in told:
            return [out / name for name in told["files"]]
        if told["error"] == Stopped.__name__:
            raise Stopped
        kind = getattr(errors, told["error"], None)
        if isinstance(kind, type) and issubclass(kind, EdgemedError):
            raise kind(told["message"])
        raise EdgemedError(f"the inference failed ({told['error']})")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        child = self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(child.stdout, self._replies), daemon=True).start()
        return child

    def _reply(self, child: subprocess.Popen[bytes], stopping: Callable[[], bool]) -> dict[str, Any]:
        end, asked = time.monotonic() + self._seconds, False
        while True:
            try:
                line = self._replies.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                pass
            if stopping() and not asked:
                asked = True
                self._write(child, "stop")
            if time.monotonic() > end:
                self.close()
                raise Timeout(f"the inference took longer than {self._seconds:g} s")
        if line.endswith(b"\n"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = child.wait()
        self.close()
        raise EdgemedError(f"the inference process ended ({_how(code)}); a fresh one takes the next job")

    def _write(self, child: subprocess.Popen[bytes], line: str) -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError):  # the child is gone: its reply tells
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()

    @property
    def pid(self) -> int | None:
        """The id of the process, None while there is none."""
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()


def _listen(pipe: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Pass on lines until the pipe ends; then an empty one."""
    with pipe:
        for line in pipe:
            replies.put(line)
    replies.put(b"")


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


# --- the child --------------------------------------------------------------------------------------------------------


def serve_jobs(process: Process) -> int:
    """Answer jobs from stdin with `process` until it ends; return 0."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # of the terminal or service: the parent says when to stop
        signal.signal(sig, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    stopping = threading.Event()
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in requests:
            if line == b"stop\n":
                stopping.set()
            else:
                jobs.put(line)
        stopping.set()  # the parent is gone
        jobs.put(b"")

    threading.Thread(target=read, daemon=True).start()
    while line := jobs.get():
        told = _answer(process, json.loads(line), stopping.is_set)
        try:
            replies.write(json.dumps(told).encode() + b"\n")
            replies.flush()
        except OSError:
            break
    return 0


def _answer(process: Process, job: dict[str, Any], stopping: Callable[[], bool]) -> dict[str, Any]:
    told: dict[str, Any] = {key: tuple(value) if key in _TUPLES else value for key, value in job["rule"].items()}
    rule = Rule(**told)
    study, out = Path(job["study"]), Path(job["out"])
    try:
        return {"files": [str(file.relative_to(out)) for file in process(rule, study, out, stopping)]}
    except (EdgemedError, Stopped) as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"error": OutOfMemory.__name__, "message": "out of memory; use a machine with more memory"}
    except Exception as error:  # noqa: BLE001  its class, never its text, which may quote a file
        return {"error": type(error).__name__, "message": ""}


def main(device: str, threads: str) -> int:
    """Answer studies on `device` until stdin ends; return 0."""
    from edgemed.serve.study import StudyProcess

    process = StudyProcess(device, int(threads) or None)
    try:
        return serve_jobs(process)
    finally:
        process.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
