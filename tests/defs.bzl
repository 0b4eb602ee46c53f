"""tower_test: a test file, run as `pytest` runs it."""

load("@rules_python//python:defs.bzl", "py_test")

def tower_test(name, size = "small", deps = [], data = []):
    """Runs the tests of `NAME.py`; a file without tests is a failure.

    A plain `py_test` of a file in pytest's style runs nothing and passes.

    Args:
      name: the file's name without `.py`.
      size: "small" for some seconds; CI runs only these under Bazel.
      deps: what the file imports.
      data: what it reads or starts.
    """
    py_test(
        name = name,
        size = size,
        timeout = "eternal",
        srcs = [
            name + ".py",
            "pytest_main.py",
        ],
        args = [name + ".py"],
        data = data + ["//:pyproject.toml"],
        main = "pytest_main.py",
        deps = deps + [":conftest"],
    )
