"""Chiefs of tests of clusters: programs in tests/cluster, with workers of theirs."""

import os
import pathlib
import signal
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def run_chief(name, *arguments, timeout=150):
    """What a script in tests/cluster says; the end of it ends its workers."""
    paths = [HERE.parent, HERE]
    chief = subprocess.Popen(
        [sys.executable, HERE / "cluster" / name, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
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
    return chief.returncode, out, err


def end(process):
    """Ends a program that has a session of its own, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
