"""Runs programs in forks of one process: TensorFlow is imported only once.

    python forked.py '[["a.py", "--flag"], ["b.py"]]'

prints, as JSON, a list of [exit status, what it printed, its errors].
"""

import json
import os
import runpy
import sys
import tempfile
import traceback

import keras  # noqa: F401
import tensorflow as tf  # noqa: F401


def run(command: list[str], out: str, err: str) -> int:
    """The exit status of `command`, run in a fork."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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


said = []
with tempfile.TemporaryDirectory() as folder:
    for command in json.loads(sys.argv[1]):
        out, err = (os.path.join(folder, name) for name in ("out", "err"))
        status = run(command, out, err)
        with open(out) as stdout, open(err) as stderr:
            said.append([status, stdout.read(), stderr.read()])
print(json.dumps(said))
