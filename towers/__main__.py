"""The command line: `python -m towers COMMAND --flag=value`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

import towers


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
      about: what it does, in a line.
      define: defines its flags.
      run: does it; gets what is no flag.
    """

    about: str
    define: Callable[[], None]
    run: Callable[[Sequence[str]], None]


def _worker_flags() -> None:
    flags.DEFINE_integer("port", None, "TensorFlow's port, such as 2222.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Where the heartbeat listens; 0.0.0.0 is all."
    )
    flags.DEFINE_integer("threads", None, "How many threads compute.")
    flags.DEFINE_integer(
        "heartbeat_port", None, "By default port + 1000, - 1000 above 64535."
    )
    flags.mark_flag_as_required("port")


def _worker(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"What is meant by {' '.join(argv[1:])}?")
    given = flags.FLAGS
    try:
        towers.serve(
            given.port, given.host, given.threads, given.heartbeat_port
        )
    except (OSError, ValueError) as error:
        sys.exit(f"towers worker: {error}")


COMMANDS = {
    "worker": Command(
        "Serves this machine's devices to a chief on a trusted network.",
        _worker_flags,
        _worker,
    ),
}


def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv[1]` names."""
    name = argv[1] if len(argv) > 1 else ""
    if name not in COMMANDS:
        print("Usage: python -m towers COMMAND --flag=value\n", file=sys.stderr)
        for known, command in COMMANDS.items():
            print(f"  {known:10} {command.about}", file=sys.stderr)
        print("\nCOMMAND --help lists its flags.", file=sys.stderr)
        sys.exit(0 if name in ("--help", "-h", "help") else 2)
    command = COMMANDS[name]
    command.define()
    app.run(command.run, [f"python -m towers {name}", *argv[2:]])


if __name__ == "__main__":
    main(sys.argv)
