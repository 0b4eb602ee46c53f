"""The BUILD files: a target for every file, with exactly what it imports."""

import ast
import pathlib
import sys

from absl.testing import parameterized

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ["towers", "tests", "examples"]
# Modules that are not ours, by who provides them; pytest runs the tests, and
# whoever asks the benchmark for a picture has Matplotlib.
FOREIGN = {
    "absl": "//towers:absl",
    "keras": "//towers:tensorflow",
    "matplotlib": None,
    "numpy": "//towers:numpy",
    "pytest": None,
    "tensorflow": "//towers:tensorflow",
}
# Of towers/defs.bzl and tests/defs.bzl: each file by what it imports.
MACROS = ("files", "helpers", "tests")


def targets(folder):
    """(rule, name, files, full labels of deps) of the targets with files."""
    entries = []
    for statement in ast.parse((ROOT / folder / "BUILD").read_text()).body:
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call):
            continue
        given = {
            k.arg: ast.literal_eval(k.value)
            for k in call.keywords
            if k.arg in ("name", "deps", "imports")
            or isinstance(k.value, ast.List)
        }
        rule = call.func.id
        if rule in MACROS:
            for name, words in given["imports"].items():
                deps = {label(folder, word) for word in words.split()}
                door = wing(folder, f"{name}.py")
                deps |= {door} - {None} if rule == "files" else set()
                entries.append((rule, name, [f"{name}.py"], deps))
        elif given.get("srcs"):
            deps = {full(folder, label) for label in given.get("deps", [])}
            entries.append((rule, given["name"], given["srcs"], deps))
    return entries


def label(folder, word):
    """The full label of a word of a macro's `imports`: see `defs.bzl`."""
    if folder == "towers" or word[0] not in ":/":
        return f"//towers:{word}"
    return full(folder, word)


def full(folder, label):
    """ ":a" in folder b is "//b:a", and "//b" is "//b:b"."""
    if label.startswith(":"):
        return f"//{folder}{label}"
    return label if ":" in label else f"{label}:{label[2:]}"


def imported(path):
    """Full names of what a file imports anywhere, as `import a.b` would."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def provider(folder, module):
    """The label that an import needs; None if Python or pytest has it."""
    first, *rest = module.split(".")
    if (ROOT / folder / f"{first}.py").exists() and folder != "towers":
        return f"//{folder}:{first}"
    if first in sys.stdlib_module_names:
        return None
    if first != "towers":
        return FOREIGN.get(first, f"a target for {first}")
    for names in (rest, rest[:-1]):
        if (
            names
            and (ROOT / "towers" / "/".join(names)).with_suffix(".py").exists()
        ):
            return f"//towers:{'/'.join(names)}"
    return "//towers:towers"


def wing(folder, file):
    """The label of what a file's folder says of itself, which it imports."""
    path = pathlib.Path(file)
    door = ROOT / folder / path.with_name("__init__.py")
    inside = len(path.parts) > 1 and path.name != door.name
    if inside and door.exists() and door.stat().st_size:
        return f"//{folder}:{path.parent}/__init__"
    return None


class BuildFilesTest(parameterized.TestCase):
    @parameterized.parameters(*FOLDERS)
    def test_every_file_has_one_target(self, folder):
        files = [f for _, _, files, _ in targets(folder) for f in files]
        present = [
            path.relative_to(ROOT / folder).as_posix()
            for path in (ROOT / folder).rglob("*.py")
            if path.stat().st_size  # Bazel adds an empty __init__.py
        ]
        self.assertNotEmpty(present)
        self.assertCountEqual(files, present, f"targets and files of {folder}")

    @parameterized.parameters(*FOLDERS)
    def test_targets_depend_on_what_they_import(self, folder):
        for _, name, files, deps in targets(folder):
            needed = {
                provider(folder, module)
                for file in files
                for module in imported(ROOT / folder / file)
            } | {wing(folder, file) for file in files}
            self.assertEqual(needed - {None}, deps, f"//{folder}:{name}")

    def test_tests_are_run_by_pytest(self):
        rules = {file: rule for rule, _, (file,), _ in targets("tests")}
        for file, rule in rules.items():
            is_test = file.endswith("_test.py")
            self.assertEqual(rule == "tests", is_test, file)

    def test_a_file_of_towers_imports_only_those_above_it(self):
        above = {f"//towers:{name}" for name in FOREIGN}
        for _, name, _, deps in targets("towers"):
            self.assertContainsSubset(deps, above, f"//towers:{name}")
            above.add(f"//towers:{name}")
