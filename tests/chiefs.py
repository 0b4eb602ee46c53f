"""Chiefs in processes of their own, workers with a core each, and their times."""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def run_chief(name: str) -> Any:
    """What a script beside this file says, as its last line."""
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / name],
        env={
            **os.environ,
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise AssertionError(done.stderr[-5000:])
    return json.loads(done.stdout.splitlines()[-1])


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
