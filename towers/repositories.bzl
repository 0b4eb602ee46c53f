"""What a WORKSPACE needs for towers, and the interpreter that runs it."""

load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive")
load("@bazel_tools//tools/build_defs/repo:utils.bzl", "maybe")

# buildifier: disable=unnamed-macro
def towers_repositories():
    """Declares what is not declared yet, and registers the interpreter.

    Bazel 4, Debian's too, then works without the internet: repositories that
    it would fetch are replaced by what is built into it. Bazel 5 and 6 fetch
    rules_python. Bazel 7 and later read MODULE.bazel, and nothing from here.
    """
    version = native.bazel_version or "4"  # Debian's 4 does not say
    major = int(version.split(".")[0])
    if major >= 7:
        return
    if major >= 5:
        maybe(
            http_archive,
            name = "rules_python",
            sha256 = "e85ae30de33625a63eca7fc40a94fea845e641888e52f32b6beea91e8b1b2793",
            strip_prefix = "rules_python-0.27.1",
            url = "https://github.com/bazelbuild/rules_python/releases/download/0.27.1/rules_python-0.27.1.tar.gz",
        )
    else:
        for name, files in _BUILT_IN.items():
            maybe(built_in_repository, name = name, files = files)
    maybe(python_interpreter, name = "towers_python")
    native.register_toolchains("@towers_python//:toolchain")

def _rules(names):
    return "\n".join(["{0} = native.{0}".format(name) for name in names])

_BUILT_IN = {
    "remote_coverage_tools": {
        "BUILD": "\n".join([
            'filegroup(name = "{}", visibility = ["//visibility:public"])'
                .format(name)
            for name in ("coverage_report_generator", "lcov_merger", "Main")
        ]),
    },
    "rules_cc": {
        "cc/BUILD": "",
        "cc/defs.bzl": _rules([
            "cc_binary",
            "cc_import",
            "cc_library",
            "cc_proto_library",
            "cc_test",
            "cc_toolchain",
            "cc_toolchain_suite",
            "objc_library",
        ]),
    },
    "rules_java": {
        "java/BUILD": "",
        "java/defs.bzl": _rules([
            "java_binary",
            "java_import",
            "java_library",
            "java_plugin",
            "java_proto_library",
            "java_runtime",
            "java_test",
            "java_toolchain",
        ]),
    },
    "rules_python": {
        "python/BUILD": "",
        "python/defs.bzl": """\
load(
    "@bazel_tools//tools/python:toolchain.bzl",
    _py_runtime_pair = "py_runtime_pair",
)
py_runtime_pair = _py_runtime_pair
""" + _rules(["py_binary", "py_library", "py_runtime", "py_test"]),
        "python/repositories.bzl": "def py_repositories():\n    pass\n",
    },
}

def _built_in_repository(repository_ctx):
    repository_ctx.file("WORKSPACE", "")
    for path, content in repository_ctx.attr.files.items():
        repository_ctx.file(path, content, executable = False)

built_in_repository = repository_rule(
    implementation = _built_in_repository,
    doc = "A repository of these files, which need nothing but Bazel 4.",
    attrs = {"files": attr.string_dict(doc = "Contents, by path.")},
)

_INTERPRETER = """\
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

py_runtime(
    name = "python3",
    interpreter_path = "{path}",
    python_version = "PY3",
    stub_shebang = "#!{path}",
)

py_runtime_pair(
    name = "pair",
    py3_runtime = ":python3",
)

toolchain(
    name = "toolchain",
    toolchain = ":pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def _python_interpreter(repository_ctx):
    environ = repository_ctx.os.environ
    path = environ.get("PYTHON_BIN_PATH")
    if not path and environ.get("VIRTUAL_ENV"):
        path = environ["VIRTUAL_ENV"] + "/bin/python3"
    if not path:
        path = repository_ctx.which("python3")
    if not path or not repository_ctx.path(str(path)).exists:
        fail("No Python interpreter at %s. Activate a virtual environment, " % path +
             "or set PYTHON_BIN_PATH to an absolute path.")
    repository_ctx.file("BUILD", _INTERPRETER.format(path = path))

python_interpreter = repository_rule(
    implementation = _python_interpreter,
    doc = "The interpreter that PYTHON_BIN_PATH names, of the activated " +
          "virtual environment, or first on the PATH.",
    environ = ["PYTHON_BIN_PATH", "VIRTUAL_ENV", "PATH"],
)
