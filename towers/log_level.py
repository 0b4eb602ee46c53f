"""log_level: the command line answers without TensorFlow's log.

Of that, the part that is written while TensorFlow is imported heeds no setting. So
where `towers` is the program that runs, this module, which comes first, imports it.
"""

import importlib
import os
import sys
import tempfile


def is_the_program() -> bool:
    """Whether `towers` is what runs: by its name, or as `python -m towers`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name != "-m":  # argv[0] while Python looks for what `-m` names
        return name == "towers"
    return sys.orig_argv[sys.orig_argv.index("-m") + 1] == "towers"


def import_quietly() -> None:
    """Imports TensorFlow with stderr aside; what it raises is seen as ever."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    stderr = os.dup(2)
    try:
        with tempfile.TemporaryFile() as aside:
            os.dup2(aside.fileno(), 2)
            importlib.import_module("tensorflow")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


if is_the_program():
    import_quietly()
