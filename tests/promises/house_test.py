"""The house: what each wing may import, and where private names may stand."""

import ast
import collections
import gc
import inspect
import itertools
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from models import placement

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
LAYOUT = {
    *("towers", "tests", "examples", "README.md", "pyproject.toml"),
    *("BUILD", "WORKSPACE", "MODULE.bazel"),
}
# They make a placement of a model of Keras's.
READERS = ("placement/from_layers", "placement/from_layout_map")
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


def at_once(tree):
    """What runs when a module is imported, as Python does; not what tools read."""
    for node in ast.iter_child_nodes(tree):
        test = getattr(node, "test", None)
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from at_once(node)


def imports(path, walk=ast.walk):
    """What a file imports of ours, as "engine/forward"; a name by its file."""
    paths = files()
    for node in walk(ast.parse(path.read_text())):
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
            yield next((c for c in candidates if c in paths), "__init__")


def loaded_by(file):
    """A file, and all of ours that is loaded with it."""
    paths, loaded, new = files(), set(), {file}
    while new:
        loaded |= new
        new = {x for f in new for x in imports(paths[f], at_once)} - loaded
    return loaded


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


def road(function):
    """The files whose functions a call goes through, each as often as it is come to.

    Of comprehensions, lambdas and generators nothing is counted.
    """
    calls, house = [], f"{HOUSE}/"

    def called(frame, event, _):
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(house)
            and not code.co_name.startswith("<")
            and not code.co_flags & inspect.CO_GENERATOR
        ):
            calls.append(code.co_filename)

    gc.collect()
    gc.disable()  # what others leave behind goes through files, too
    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return [file for file, _ in itertools.groupby(calls)]


def build(units):
    """Two dense layers as towers, in a step of one's own."""
    model, where = dense(units), placement(2)

    @tf.function(autograph=False)
    def step(x):
        return towers.build_towers(model, x, where).outputs

    spec = tf.TensorSpec([None, 3])
    return lambda: step.get_concrete_function(spec)


def fit(units):
    """Their first `fit`."""
    model = towers.TowerModel(dense(units), placement(2))
    model.compile("sgd", "mse")
    x, y = np.ones([8, 3], "float32"), np.ones([8, units], "float32")
    return lambda: model.fit(x, y, batch_size=4, verbose=0)


def dense(units):
    each = [keras.layers.Dense(4), keras.layers.Dense(units)]
    return keras.Sequential([keras.Input([3]), *each])


class RoadTest(parameterized.TestCase):
    @parameterized.parameters((build, 34, 300), (fit, 50, 460))
    @pytest.mark.slow(after=1)
    def test_it_is_no_longer_than_it_was(self, way, files, moves):
        """Files that are entered, and moves from one to the next."""
        way(3)()  # what is done once
        passed = road(way(2))
        self.assertLessEqual(len(set(passed)), files, sorted(set(passed)))
        self.assertLessEqual(len(passed) - 1, moves)

    def test_build_py_is_the_story_only(self):
        story = (HOUSE / "build.py").read_text().splitlines()
        self.assertLessEqual(len(story), 240)
        below = loaded_by("build") - {"build"}
        self.assertLessEqual(len(below), 72, sorted(below))


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
                if wing == "placement" and file not in READERS:
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

    def test_what_no_step_needs_is_loaded_when_it_is_asked_for(self):
        """And opens its doors then: one that is gone ends nothing else."""
        loaded = loaded_by("__init__")
        later = ("planning/", "report/", "export", "cluster/worker")
        self.assertEqual([x for x in loaded if x.startswith(later)], [])
        only = "tf_kernels tf_placer tf_profiler tf_saved_model tf_traces"
        self.assertEmpty({f"foreign/{x}" for x in only.split()} & loaded)

    def test_tools_see_what_is_loaded_later(self):
        """Each name, of the module that it is loaded from."""
        source = ast.parse(files()["__init__"].read_text())
        seen = [x for x in ast.walk(source) if isinstance(x, ast.ImportFrom)]
        seen = {a.name: x.module for x in seen for a in x.names}
        for name, module in towers._LATER.items():
            self.assertEqual(seen[name], f"towers.{module}")
        self.assertEqual(
            [x for x in towers.__all__ if not hasattr(towers, x)], []
        )

    def test_the_top_level_is_the_layout(self):
        ignored = (
            "build",
            "dist",
            "bazel-*",
            "*.egg-info",
            "__pycache__",
            ".*",
        )
        there = {
            path.name
            for path in HOUSE.parent.iterdir()
            if not any(map(path.match, ignored))
        }
        self.assertLessEqual(there, LAYOUT)

    def test_no_two_test_files_have_one_name(self):
        """Which pytest takes for one module, if it is to run both."""
        tests = (HOUSE.parent / "tests").rglob("*.py")
        names = collections.Counter(path.name for path in tests)
        self.assertEqual([n for n, count in names.items() if count > 1], [])

    def test_no_two_files_of_the_house_have_one_name(self):
        names = collections.Counter(file.split("/")[-1] for file in files())
        del names["__init__"]
        self.assertEqual([n for n, count in names.items() if count > 1], [])

    def test_no_two_classes_or_functions_for_others_have_one_name(self):
        names = collections.Counter(
            node.name
            for path in files().values()
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef)
            or isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
        )
        self.assertEqual([n for n, count in names.items() if count > 1], [])

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

    def test_the_door_s_table_names_every_file_and_what_it_takes(self):
        text = (HOUSE / "foreign" / "README.md").read_text()
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.M))
        others = re.search(
            r"^((?:`\w+`(?:, | and )?)+) take nothing", text, re.M
        )
        results = {*rows, *re.findall(r"`(\w+)`", others[1])}
        there = {path.stem for path in (HOUSE / "foreign").glob("*.py")}
        self.assertEqual(results, there - {"__init__"})
        for file, taken in rows.items():
            source = (HOUSE / "foreign" / f"{file}.py").read_text()
            for name in re.findall(r"`([\w.]+)\*?`", taken):
                self.assertIn(name.split(".")[-1], source, file)

    def test_the_map_names_every_wing(self):
        for path in HOUSE.iterdir():
            if (path / "__init__.py").exists():
                self.assertIn(f"\n  {path.name}", towers.__doc__)
