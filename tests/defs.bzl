"""tests and helpers: a target for each file; tests run as `pytest` runs them."""

load("@rules_python//python:defs.bzl", "py_library", "py_test")
load("//towers:defs.bzl", "words")

def _labels(text):
    """Of names as `imports` has them: ":models" is here, "verbs/split" in towers."""
    return [
        word if word[0] in ":/" else "//towers:" + word
        for word in words(text)
    ]

# buildifier: disable=unnamed-macro
def helpers(imports):
    """One `py_library` per file: NAME for NAME.py.

    Args:
      imports: by name, what the file imports, as one string.
    """
    for name, text in imports.items():
        py_library(
            name = name,
            testonly = True,
            srcs = [name + ".py"],
            imports = ["."],
            deps = _labels(text),
        )

# buildifier: disable=unnamed-macro
def tests(imports, size = "small", data = []):
    """Runs the tests of each file; a file without tests is a failure.

    A plain `py_test` of a file in pytest's style runs nothing and passes.

    Args:
      imports: by name, what the file imports, as one string.
      size: "small" for some seconds; CI runs only these under Bazel.
      data: what they read or start.
    """
    for name, text in imports.items():
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
            deps = _labels(text) + [":conftest"],
        )
