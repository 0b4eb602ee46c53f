"""Programs of tests in processes of their own, workers with a core each, and times."""

import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def said(name: str, *arguments: str, **kwargs: Any) -> Any:
    """The JSON that a program in tests/programs prints as its last line."""
    return json.loads(run_chief(name, *arguments, **kwargs).splitlines()[-1])


def run_chief(
    name: str, *arguments: str, status: int = 0, timeout: float = 600
) -> str:
    """What a program in tests/programs prints; the end of it ends its workers."""
    here = pathlib.Path(__file__).parent
    chief = subprocess.Popen(
        [sys.executable, here / "programs" / name, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = chief.communicate(timeout=timeout)
    finally:
        end(chief)
    if chief.returncode != status:
        raise AssertionError(f"{name}: {chief.returncode}\n{err[-5000:]}")
    return out


def end(process: subprocess.Popen) -> None:
    """Ends a program that has a session of its own, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def pin(pid: int, core: int) -> None:
    """Keeps all threads of a process on one core."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), {core})


def busy(core: int) -> int:
    """A process that keeps a core busy as long as this one is there."""
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    os.sched_setaffinity(0, {core})
    while os.getppid() == parent:
        pass
    os._exit(0)


def interleaved(
    steps: Sequence[Callable[[], Any]], rounds: int = 9
) -> list[float]:
    """Medians of the seconds that steps take, one after the other in rounds."""
    taken: list[list[float]] = [[] for _ in steps]
    for k in range(rounds + 1):
        for step, seconds in zip(steps, taken):
            start = time.perf_counter()
            step()
            if k:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]
