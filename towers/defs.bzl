"""files: a target for each file, which says what the file imports."""

load("@rules_python//python:defs.bzl", "py_library")

def words(text):
    """The words of a string, which may have several lines."""
    return [word for word in text.replace("\n", " ").split(" ") if word]

# buildifier: disable=unnamed-macro
def files(imports):
    """One `py_library` per file: NAME for NAME.py.

    Args:
      imports: by name, the targets of this folder that the file imports, as one
        string. What its wing says of itself, in `__init__`, is among them anyhow.
    """
    doors = [name for name in imports if name.endswith("/__init__")]
    for name, text in imports.items():
        door = name.rpartition("/")[0] + "/__init__"
        inside = [x for x in doors if x == door and x != name]
        py_library(
            name = name,
            srcs = [name + ".py"],
            imports = [".."],
            deps = [":" + other for other in words(text) + inside],
        )
