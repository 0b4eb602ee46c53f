"""Runs programs in forks of one process: TensorFlow is imported only once.

    python forked.py '[["a.py", "--flag"], ["b.py"]]' 2

runs two at a time (one, unless it is told), and prints, as JSON, a list of [exit
status, what it printed, its errors].
"""

import json
import os
import pathlib
import runpy
import sys
import tempfile
import traceback

import keras  # noqa: F401
import tensorflow as tf  # noqa: F401


def start(command: list[str], out: str, err: str) -> int:
    """The process id of a fork that runs `command`."""
    child = os.fork()
    if child:
        return child
    status = 1
    for descriptor, path in ((1, out), (2, err)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags), descriptor)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


commands = json.loads(sys.argv[1])
at_once = int(sys.argv[2]) if len(sys.argv) > 2 else 1
statuses, running = {}, {}  # by number, and numbers by process


def wait() -> None:
    """Until one of those that run has ended."""
    child, status = os.wait()
    statuses[running.pop(child)] = os.waitstatus_to_exitcode(status)


with tempfile.TemporaryDirectory() as folder:
    paths = [
        [os.path.join(folder, f"{name}_{i}") for name in ("out", "err")]
        for i in range(len(commands))
    ]
    for i, command in enumerate(commands):
        if len(running) == at_once:
            wait()
        running[start(command, *paths[i])] = i
    while running:
        wait()
    said = []
    for i, files in enumerate(paths):
        texts = [pathlib.Path(file).read_text() for file in files]
        said.append([statuses[i], *texts])
print(json.dumps(said))
