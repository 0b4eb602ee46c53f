"""The command line: `python -m towers COMMAND --flag=value`.

It exits with 0 if all went well, with 1 if a plan is refused or towers differ from
the plain model, with 2 after one line about what was asked for wrongly.
"""

import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tensorflow as tf
from absl import app, flags

import towers
from towers.planning import commands

_HELP = ("--help", "-help", "-h", "help")
_LONGEST = 600  # characters of a line that says what is wrong
# What is said in a line; all else is a mistake of ours, and is shown in full.
_TROUBLES = (
    ImportError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    tf.errors.OpError,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
      about: what it does, in a line.
      define: defines its flags.
      run: does it; gets what is no flag.
      examples: of calls, a line each.
    """

    about: str
    define: Callable[[], None]
    run: Callable[[Sequence[str]], None]
    examples: str


def _worker_flags() -> None:
    flags.DEFINE_integer("port", None, "TensorFlow's port, such as 2222.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Where the heartbeat listens; 0.0.0.0 is all."
    )
    flags.DEFINE_integer("threads", None, "How many threads compute.")
    flags.DEFINE_integer(
        "heartbeat_port", None, "By default port + 1000, - 1000 above 64535."
    )
    _needed("port", "such as --port=2222")


def _worker(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _refuse("worker", f"What is meant by {' '.join(argv[1:])}?")
    given = flags.FLAGS
    towers.serve(given.port, given.host, given.threads, given.heartbeat_port)


def _needed(flag: str, example: str) -> None:
    flags.register_validator(
        flag, lambda value: value is not None, f"is needed: {example}"
    )


def _no_flags() -> None:
    pass


def _devices(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _refuse("devices", f"What is meant by {' '.join(argv[1:])}?")
    print(commands.device_table())


def _batch_flags() -> None:
    flags.DEFINE_list("devices", None, "One per tower: /CPU:0,/CPU:1")
    flags.DEFINE_list("weights", None, "Shares of the batch: 3,1")
    flags.DEFINE_string(
        "parameters", "/CPU:0", "A device, 'balanced' or 'round_robin'."
    )
    flags.DEFINE_integer("batch", 64, "Rows of the batch, of random values.")
    flags.DEFINE_integer("length", 16, "For dimensions that are left open.")
    _needed("devices", "one per tower, such as --devices=/CPU:0,/CPU:1")


def _step_flags() -> None:
    _batch_flags()
    flags.DEFINE_enum("step", "train", ["train", "predict"], "What is run.")
    flags.DEFINE_string("optimizer", "sgd", "Which one trains.")


def _compare_flags() -> None:
    _batch_flags()
    flags.DEFINE_boolean(
        "synchronized",
        False,
        "Whether batch norms take the whole batch's rows.",
    )


def _file_flags() -> None:
    flags.DEFINE_string("html", None, "Where to write a page.")
    flags.DEFINE_string("json", None, "Where to write JSON.")


def _report_flags() -> None:
    _step_flags()
    _file_flags()
    flags.DEFINE_boolean("loops", False, "Whether to count inside loops.")
    flags.DEFINE_string(
        "picture", None, "Where Graphviz draws the towers: placement.svg"
    )
    flags.DEFINE_string(
        "figure", None, "Where matplotlib draws bytes by device: figure.png"
    )


def _plan_flags() -> None:
    _step_flags()
    _file_flags()
    flags.DEFINE_integer("gpus", None, "By default as many as are named.")
    flags.DEFINE_boolean("strict", False, "As without soft placement.")


def _timeline_flags() -> None:
    _step_flags()
    flags.DEFINE_string("save", None, "Where to write a trace, as JSON.")


def _step(
    command: str,
    argv: Sequence[str],
    picture: str | None = None,
    available: str | None = None,
) -> tuple[Any, ...]:
    """The step that the flags speak of; its towers are drawn to `picture`."""
    given = flags.FLAGS
    model, placement = _placed(command, argv, available)
    if picture is not None:
        towers.plot_placement(model, placement, picture)
    return commands.step_of(
        model,
        placement,
        *(given.batch, given.step, given.length, given.optimizer),
    )


def _placed(
    command: str, argv: Sequence[str], available: str | None = None
) -> tuple[Any, towers.Placement]:
    """The model and the placement that are asked for."""
    given = flags.FLAGS
    if len(argv) != 2:
        _refuse(
            command,
            "expected one model, a file or module:function; got "
            f"{len(argv) - 1}.",
        )
    placement = commands.placement_of(
        given.devices, given.weights, given.parameters, available
    )
    return commands.loaded(argv[1]), placement


def _compare(argv: Sequence[str]) -> None:
    """Ends with 1 if the towers' numbers are others."""
    given = flags.FLAGS
    model, placement = _placed("compare", argv)
    inputs = commands.batch_of(model, given.batch, given.length)
    options = {"synchronized": given.synchronized}
    found = towers.compare(model, placement, inputs, **options)
    print(found)
    sys.exit(0 if found.equal else 1)


def _report(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    paths = _paths("report", "html", "json", "figure", "picture")
    step = _step("report", argv, given.picture)
    report = towers.execution_report(*step, loops=given.loops)
    for flag in {"html", "json"} & set(paths):
        report.save(paths[flag])
    if "figure" in paths:
        report.plot().savefig(paths["figure"])
    print(report)


def _plan(argv: Sequence[str]) -> None:
    """Ends with 1 if something is refused."""
    given = flags.FLAGS
    paths = _paths("plan", "html", "json")
    named = [*given.devices, *[given.parameters] * (":" in given.parameters)]
    machine = commands.machine_of(named, given.gpus)
    function, *args = _step("plan", argv, available="any")
    try:
        plan = towers.placement_plan(
            function.__self__,
            *args,
            machine=machine,
            strict=given.strict,
            step=given.step,
        )
    except RuntimeError as error:  # a TensorFlow without kernels for GPUs
        _refuse("plan", error)
    for path in paths.values():
        plan.save(path)
    print(plan)
    sys.exit(1 if plan.refused else 0)


def _paths(command: str, *outputs: str) -> dict[str, str]:
    """The files that are to be written, by flag: checked before anything runs."""
    given = {flag: getattr(flags.FLAGS, flag) for flag in outputs}
    paths = {flag: path for flag, path in given.items() if path is not None}
    for flag, path in paths.items():
        _writable(command, path)
        commands.check_ending(flag, path)
    return paths


def _timeline(argv: Sequence[str]) -> None:
    paths = _paths("timeline", "save")
    found = towers.timeline(*_step("timeline", argv))
    for path in paths.values():
        found.save(path)
    print(found)


def _writable(command: str, path: str) -> None:
    """Refuses what is no place for a file."""
    if os.path.isdir(path):
        _refuse(command, f"{path} is a folder; expected a file's name")
    if not os.path.isdir(os.path.dirname(path) or "."):
        _refuse(command, f"there is no folder for {path}")


def _refuse(command: str, message: Any) -> NoReturn:
    """One line, and 2."""
    line = " ".join(str(message).split())
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}..."
    print(f"towers {command}: {line}", file=sys.stderr)
    sys.exit(2)


COMMANDS = {
    "worker": Command(
        "Serves this machine's devices to a chief on a trusted network.",
        _worker_flags,
        _worker,
        "python -m towers worker --port=2222",
    ),
    "devices": Command(
        "What TensorFlow sees here.",
        _no_flags,
        _devices,
        "python -m towers devices",
    ),
    "report": Command(
        "What a step of a model runs where, and what crosses.",
        _report_flags,
        _report,
        "python -m towers report model.keras --devices=/CPU:0,/CPU:1\n"
        "python -m towers report my.models:make --devices=/GPU:0,/GPU:1 "
        "--batch=128 --parameters=balanced --html=report.html",
    ),
    "compare": Command(
        "Whether a model has the same numbers in towers as without.",
        _compare_flags,
        _compare,
        "python -m towers compare model.keras --devices=/CPU:0,/CPU:1",
    ),
    "plan": Command(
        "Where a step of a model would be on a machine that is not here.",
        _plan_flags,
        _plan,
        "python -m towers plan model.keras --devices=/GPU:0,/GPU:1 --strict",
    ),
    "timeline": Command(
        "What a step of a model runs when, and what it waits for.",
        _timeline_flags,
        _timeline,
        "python -m towers timeline model.keras --devices=/CPU:0,/CPU:1 "
        "--weights=3,1 --save=step.json",
    ),
}


def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv[1]` names."""
    name = argv[1] if len(argv) > 1 else ""
    if name not in COMMANDS:
        if name and name not in _HELP:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            _refuse(name, f"there is no such command.{hint}")
        file = sys.stdout if name else sys.stderr
        print("Usage: python -m towers COMMAND --flag=value\n", file=file)
        for known, command in COMMANDS.items():
            print(f"  {known:10} {command.about}", file=file)
        print("\nCOMMAND --help lists its flags.", file=file)
        sys.exit(0 if name else 2)
    command = COMMANDS[name]
    command.define()

    def parsed(arguments: Sequence[str]) -> Any:
        if set(_HELP) & set(arguments):
            about = flags.FLAGS.module_help(_report_flags.__module__)
            examples = "\n".join(
                f"  {line}" for line in command.examples.splitlines()
            )
            print(f"{command.about}\n\n{examples}\n{about}")
            sys.exit(0)
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            _refuse(name, error)

    def run(arguments: Sequence[str]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                command.run(arguments)
        except _TROUBLES as error:
            _refuse(name, error)

    program = f"python -m towers {name}"
    app.run(run, [program, *argv[2:]], flags_parser=parsed)


def console() -> None:
    """The program `towers` that a wheel installs."""
    main(sys.argv)


if __name__ == "__main__":
    main(sys.argv)
