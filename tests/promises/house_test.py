"""The house: what each wing may import, and where private names may stand."""

import ast
import pathlib
import re

from absl.testing import absltest, parameterized

import towers

HOUSE = pathlib.Path(towers.__file__).parent
# From the bottom up: each imports what is before it in the list only. Files at
# the top level that are no folder are the storey of `build`.
STOREYS = [
    "foreign",
    "placement",
    "cluster",
    "report",
    "engine",
    "verbs",
    "keras_model",
    "build",
    "wrapper",
    "planning",
    "__init__",
    "__main__",
]
FOREIGN_MODULES = re.compile(
    r"(keras\.src|tensorflow\.python|tensorflow\.core|tensorflow\.compiler)\b"
)
PRIVATE = re.compile(r"_[a-zA-Z]\w*[a-z]\w*")
INTERNAL = "__internal__"


def files():
    return {
        path.relative_to(HOUSE).with_suffix("").as_posix(): path
        for path in HOUSE.rglob("*.py")
    }


def imports(path):
    """What a file imports of ours, as "engine/forward"; a name by its file."""
    known = files()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first != "towers":
                continue
            candidates = ["/".join(rest), "/".join(rest[:-1])]
            yield next((c for c in candidates if c in known), "__init__")


def storey(file):
    folder = file.split("/")[0]
    if "/" not in file and file not in ("__init__", "__main__"):
        folder = "build"
    return STOREYS.index(folder)


def private_names(source):
    """(line, name) of what is private and not ours, by the syntax tree."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in (
                "self",
                "cls",
            )
            source = isinstance(node.value, ast.Name) and (
                node.value.id,
                node.attr,
            ) == ("keras", "src")
            if (
                source
                or node.attr == INTERNAL
                or (PRIVATE.fullmatch(node.attr) and not own)
            ):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if FOREIGN_MODULES.match(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if FOREIGN_MODULES.match(name):
                    yield node.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in docstrings:
                continue
            if (
                PRIVATE.fullmatch(node.value)
                or FOREIGN_MODULES.search(node.value)
                or INTERNAL in node.value
            ):
                yield node.lineno, node.value


def defined(source):
    """Private names that a file's own functions, classes and `self` have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def strangers(source):
    """(line, name) of what is private there and of Keras or TensorFlow."""
    own = set(defined(source))
    return [
        (line, name)
        for line, name in private_names(source)
        if name not in own and not name.startswith("_towers_")
    ]


class HouseTest(parameterized.TestCase):
    def test_a_wing_imports_only_what_is_below_it(self):
        for file, path in files().items():
            for other in imports(path):
                self.assertLessEqual(
                    storey(other), storey(file), f"{file} imports {other}"
                )

    def test_wings_that_are_to_know_little_know_no_more(self):
        for file, path in files().items():
            wing = file.split("/")[0]
            for other in imports(path):
                there = other.split("/")[0]
                if wing == "foreign":
                    self.assertEqual(there, wing, f"{file} imports {other}")
                if wing == "placement" and file != "placement/from_layers":
                    self.assertEqual(there, wing, f"{file} imports {other}")
                if wing == "engine":
                    self.assertIn(there, ("engine", "foreign"), file)
                if wing in ("engine", "verbs", "report", "cluster"):
                    self.assertFalse(
                        other.startswith("foreign/keras"),
                        f"{file} imports {other}",
                    )
                if wing not in ("__init__", "planning") and there == "report":
                    self.assertEqual(wing, "report", f"{file} imports {other}")

    def test_there_is_no_circle(self):
        below = {file: set(imports(path)) for file, path in files().items()}
        while below:
            free = [file for file, others in below.items() if not others]
            self.assertNotEmpty(free, f"a circle among {sorted(below)}")
            for file in free:
                del below[file]
            for others in below.values():
                others.difference_update(free)

    def test_private_names_stand_in_foreign_only(self):
        for file, path in files().items():
            if not file.startswith("foreign/"):
                self.assertEqual(strangers(path.read_text()), [], file)

    @parameterized.parameters(
        "layer._flatten_layers()",
        "from tensorflow.python import pywrap_tfe",
        "from tensorflow.python.eager import context",
        "import tensorflow.python.eager.context as context",
        "import keras.src",
        "from keras.src import tree",
        "from keras import src",
        "keras.src.tree.flatten(x)",
        "tf.__internal__.decorator",
        'getattr(layer, "_flatten_layers")',
        'node.attr.pop("_gradient_op_type")',
        'importlib.import_module("keras.src.tree")',
    )
    def test_a_private_name_is_found(self, line):
        self.assertLen(strangers(line), 1)

    def test_what_is_ours_is_none(self):
        source = "class A:\n    def _f(self): self._b = a._b + a._f() + self._c"
        self.assertEmpty(strangers(source))

    def test_the_map_names_every_wing(self):
        for path in HOUSE.iterdir():
            if (path / "__init__.py").exists():
                self.assertIn(f"\n  {path.name}", towers.__doc__)


if __name__ == "__main__":
    absltest.main()
