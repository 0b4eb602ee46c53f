"""Runs one test file with pytest and its settings: `pytest_main.py FILE`.

Under Bazel, which gives it a folder for temporary files. No tests in the file
are an error, as always with pytest.
"""

import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent

if __name__ == "__main__":
    os.environ.setdefault("TMPDIR", os.environ["TEST_TMPDIR"])
    settings = ["-c", str(HERE.parent / "pyproject.toml")]
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(pytest.main([*settings, *plain, str(HERE / sys.argv[1])]))
