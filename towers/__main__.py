"""The command line: `python -m towers COMMAND ...`.

It exits with 0 if all went well; with 1 if a plan is refused, towers differ from the
plain model, or what was to be checked is not so; with 2 after one line about what was
asked for wrongly.
"""

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tensorflow as tf

import towers
from towers.foreign.doors import opened

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
_PROGRAM = "python -m towers"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            **kwargs,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        _refuse(self.prog.removeprefix(_PROGRAM).strip(), message)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """All commands with their flags, and what the commands are called."""
    whole = _Parser(
        prog=_PROGRAM,
        description="Decide where a TensorFlow graph runs.",
        epilog=f"{_PROGRAM} COMMAND --help tells of its flags.",
    )
    whole.add_argument(
        "--version", action="version", version=towers.__version__
    )
    several = whole.add_subparsers(metavar="COMMAND", required=True)

    def command(
        run: Callable[[argparse.Namespace], None], about: str, *examples: str
    ) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("_")
        shown = "".join(f"\n  {_PROGRAM} {name} {x}" for x in examples)
        flags = several.add_parser(
            name, help=about, description=about, epilog=f"For example:{shown}"
        )
        flags.set_defaults(run=run, command=name)
        return flags

    _worker_flags(
        command(
            _worker,
            "Serves this machine's devices to a chief on a trusted network.",
            "--port=2222 --host=0.0.0.0",
        )
    )
    command(_devices, "What TensorFlow sees here.", "")
    flags = command(
        _report,
        "What a step of a model runs where, and what crosses.",
        "model.keras --devices=/CPU:0,/CPU:1 --check",
        "my.models:make --devices=/GPU:0,/GPU:1 --batch=128 "
        "--parameter-device=balanced --html=report.html",
    )
    _step_flags(flags)
    _file_flags(flags)
    flags.add_argument(
        "--loops", action="store_true", help="Count inside loops, too."
    )
    flags.add_argument(
        "--check",
        action="store_true",
        help="Exit with 1 if an op of a tower ran elsewhere than asked.",
    )
    flags.add_argument("--picture", help="Where Graphviz draws: placement.svg")
    flags.add_argument("--figure", help="Where matplotlib draws: figure.png")
    flags = command(
        _compare,
        "Whether a model has the same numbers in towers as without.",
        "model.keras --devices=/CPU:0,/CPU:1",
    )
    _batch_flags(flags)
    flags.add_argument(
        "--synchronized",
        action="store_true",
        help="Batch norms take the whole batch's rows.",
    )
    flags = command(
        _plan,
        "Where a step of a model would be on machines that are not here.",
        "model.keras --devices=/GPU:0,/GPU:1 --strict",
    )
    _step_flags(flags)
    _file_flags(flags)
    flags.add_argument(
        "--gpus", type=int, help="Of each machine; else as many as are named."
    )
    flags.add_argument(
        "--strict", action="store_true", help="As without soft placement."
    )
    flags = command(
        _timeline,
        "What a step of a model runs when, and what it waits for.",
        "model.keras --devices=/CPU:0,/CPU:1 --weights=3,1 --html=step.html",
    )
    _step_flags(flags)
    flags.add_argument("--html", help="Where to write a page: step.html")
    flags.add_argument("--save", help="Where to write a trace: step.json")
    return whole, list(several.choices)


def _worker_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--port", type=int, required=True, help="TensorFlow's, such as 2222."
    )
    flags.add_argument(
        "--host",
        default="127.0.0.1",
        help="Where the heartbeat listens; 0.0.0.0 is all.",
    )
    flags.add_argument("--threads", type=int, help="How many compute.")
    flags.add_argument(
        *("--heartbeat-port", "--heartbeat_port"),
        type=int,
        help="By default port + 1000, - 1000 above 64535.",
    )


def _batch_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("model", help="A saved model, or module:function.")
    flags.add_argument(
        "--devices",
        type=_listed,
        required=True,
        help="One per tower: /CPU:0,/CPU:1",
    )
    flags.add_argument(
        "--weights", type=_listed, help="Shares of the batch: 3,1"
    )
    flags.add_argument(
        *("--parameter-device", "--parameters"),
        default="/CPU:0",
        help="A device, 'balanced' or 'round_robin'.",
    )
    flags.add_argument(
        "--batch", type=int, default=64, help="Rows of random values."
    )
    flags.add_argument(
        "--length", type=int, default=16, help="Of open dimensions."
    )


def _step_flags(flags: argparse.ArgumentParser) -> None:
    _batch_flags(flags)
    flags.add_argument("--step", choices=["train", "predict"], default="train")
    flags.add_argument("--optimizer", default="sgd", help="Which one trains.")


def _file_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--html", help="Where to write a page.")
    flags.add_argument("--json", help="Where to write JSON.")


def _commands() -> Any:
    """The module of the commands on models, which no worker imports."""
    with opened(_PROGRAM):
        from towers.planning import commands
    return commands


def _worker(arguments: argparse.Namespace) -> None:
    towers.serve(
        arguments.port,
        arguments.host,
        arguments.threads,
        arguments.heartbeat_port,
    )


def _devices(arguments: argparse.Namespace) -> None:
    print(_commands().device_table())


def _step(
    arguments: argparse.Namespace,
    picture: str | None = None,
    available: str | None = None,
) -> tuple[Any, ...]:
    """The step that the flags speak of; its towers are drawn to `picture`."""
    model, placement = _placed(arguments, available)
    if picture is not None:
        towers.plot_placement(model, placement, picture)
    return _commands().step_of(
        model,
        placement,
        *(
            arguments.batch,
            arguments.step,
            arguments.length,
            arguments.optimizer,
        ),
    )


def _placed(
    arguments: argparse.Namespace, available: str | None = None
) -> tuple[Any, towers.Placement]:
    """The model and the placement that are asked for."""
    placement = _commands().placement_of(
        arguments.devices,
        arguments.weights,
        arguments.parameter_device,
        available,
    )
    return _commands().loaded(arguments.model), placement


def _compare(arguments: argparse.Namespace) -> None:
    """Ends with 1 if the towers' numbers are others."""
    model, placement = _placed(arguments)
    inputs = _commands().batch_of(model, arguments.batch, arguments.length)
    options = {"synchronized": arguments.synchronized}
    comparison = towers.compare(model, placement, inputs, **options)
    print(comparison)
    sys.exit(0 if comparison.equal else 1)


def _report(arguments: argparse.Namespace) -> None:
    """Ends with 1 if a tower is to be checked, and ran elsewhere than asked."""
    paths = _paths(arguments, "html", "json", "figure", "picture")
    step = _step(arguments, arguments.picture)
    report = towers.execution_report(*step, loops=arguments.loops)
    for flag in {"html", "json"} & set(paths):
        report.save(paths[flag])
    if "figure" in paths:
        report.plot().savefig(paths["figure"])
    print(report)
    _say_written(paths)
    if arguments.check:
        placement = step[0].__self__.placement
        try:
            for i, device in enumerate(placement.devices):
                report.assert_runs_on(f"tower_{i}", device)
        except AssertionError as error:
            print(f"\n{error}")
            sys.exit(1)
        print(f"All ops of {len(placement.devices)} towers ran where asked.")


def _plan(arguments: argparse.Namespace) -> None:
    """Ends with 1 if something is refused."""
    paths = _paths(arguments, "html", "json")
    parameters = arguments.parameter_device
    named = [*arguments.devices, *[parameters] * (":" in parameters)]
    machine = _commands().machine_for(named, arguments.gpus)
    function, *args = _step(arguments, available="any")
    plan = towers.placement_plan(
        function.__self__,
        *args,
        machine=machine,
        strict=arguments.strict,
        step=arguments.step,
    )
    for path in paths.values():
        plan.save(path)
    print(plan)
    _say_written(paths)
    sys.exit(1 if plan.refused else 0)


def _timeline(arguments: argparse.Namespace) -> None:
    paths = _paths(arguments, "html", "save")
    timeline = towers.timeline(*_step(arguments))
    for path in paths.values():
        timeline.save(path)
    print(timeline)
    _say_written(paths)


def _paths(arguments: argparse.Namespace, *outputs: str) -> dict[str, str]:
    """The files that are to be written, by flag: checked before anything runs."""
    named = {flag: getattr(arguments, flag) for flag in outputs}
    paths = {flag: path for flag, path in named.items() if path is not None}
    for flag, path in paths.items():
        _writable(arguments.command, path)
        _commands().check_flag_ending(flag, path)
    return paths


def _say_written(paths: dict[str, str]) -> None:
    for path in paths.values():
        print(f"Wrote {path}")


def _writable(command: str, path: str) -> None:
    """Refuses what is no place for a file."""
    if os.path.isdir(path):
        _refuse(command, f"{path} is a folder; expected a file's name")
    if not os.path.isdir(os.path.dirname(path) or "."):
        _refuse(command, f"there is no folder for {path}")


def _refuse(command: str, message: Any) -> NoReturn:
    """Ends the program with a line on stderr, and the status 2."""
    line = " ".join(str(message).split())
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}..."
    name = f"towers {command}".strip()
    print(f"{name}: {line}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv[1]` names."""
    whole, names = parser()
    name = argv[1] if len(argv) > 1 else ""
    if name in ("", "help"):
        whole.print_help(sys.stdout if name else sys.stderr)
        sys.exit(0 if name else 2)
    if not name.startswith("-") and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        _refuse(name, f"there is no such command.{hint}")
    arguments = whole.parse_args(argv[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            arguments.run(arguments)
    except _TROUBLES as error:
        _refuse(arguments.command, error)


def console() -> None:
    """The program `towers` that a wheel installs."""
    main(sys.argv)


if __name__ == "__main__":
    main(sys.argv)
