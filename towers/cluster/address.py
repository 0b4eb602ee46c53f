"""address: where a worker is: `host:port`, or `host:port:heartbeat`."""

import dataclasses
import re
import socket
from collections.abc import Sequence
from typing import Any

_FORM = re.compile(r"(?:grpc://)?(\[[^\]]+\]|[^:\[\]/\s]+):(\d+)(?::(\d+))?")


@dataclasses.dataclass(frozen=True)
class Address:
    """An address of a worker.

    >>> from towers.cluster.address import Address
    >>> Address.parse("10.0.0.2:2222").heartbeat
    3222

    Attributes:
      host: a name or an IP address, without brackets.
      port: TensorFlow's.
      heartbeat: the port that says whether the worker is alive.
      text: as the user wrote it.
    """

    host: str
    port: int
    heartbeat: int
    text: str

    @classmethod
    def parse(cls, text: Any, argument: str = "address") -> "Address":
        """The address that a text names.

        Raises:
          TypeError: it is no text.
          ValueError: it is no address.
        """
        expected = (
            f"`{argument}` must be 'host:port' or 'host:port:heartbeat', such "
            "as '10.0.0.2:2222' (an IPv6 host in brackets)"
        )
        if not isinstance(text, str):
            raise TypeError(f"{expected}; got {text!r}.")
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{expected}; got {text!r}.")
        host, port, heartbeat = match.groups()
        check_port(argument, int(port))
        beat = int(heartbeat) if heartbeat else heartbeat_port(int(port))
        check_port(argument, beat)
        return cls(host.strip("[]"), int(port), beat, text)

    @property
    def target(self) -> str:
        """`host:port`, as TensorFlow takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def ip_addresses(self) -> set[str]:
        """The IP addresses of the host, as sockets tell them."""
        try:
            entries = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )
        except OSError:
            return {self.host}
        return {plain_ip(str(entry[4][0])) for entry in entries}


def plain_ip(ip: str) -> str:
    """An IPv4 address that came in the clothes of IPv6, without them."""
    return ip.removeprefix("::ffff:").split("%")[0]


def heartbeat_port(port: int) -> int:
    """Where a worker's heartbeat is, if nothing else is said."""
    return port + 1000 if port <= 64535 else port - 1000


def check_port(argument: str, port: Any) -> None:
    """Raises unless `port` is one."""
    expected = f"`{argument}` must have a port from 1 to 65535; got {port!r}"
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"{expected} of type {type(port).__name__}.")
    if not 1 <= port <= 65535:
        raise ValueError(f"{expected}. Choose a free one, such as 2222.")


def own_address(workers: list[Address]) -> str:
    """Where workers can call this process back: its address, and a free port.

    The address is that of the interface by which the workers are reached; one
    that is not on this machine decides.
    """
    host = ""
    for worker in workers:
        for family, kind in ((socket.AF_INET, "ip"), (socket.AF_INET6, "ip6")):
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect((worker.host, worker.port))  # sends nothing
                    address = str(probe.getsockname()[0])
            except OSError:
                continue
            address = f"[{address}]" if kind == "ip6" else address
            if not host or not address.startswith(("127.", "[::1]")):
                host = address
            break
    host = host or "127.0.0.1"
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host.strip("[]"), 0))
        return f"{host}:{probe.getsockname()[1]}"


def checked_addresses(
    addresses: Sequence[str], timeout: float, heartbeat: float
) -> list[Address]:
    """Addresses of workers, each once.

    Raises:
      TypeError, ValueError: as for `Cluster`.
    """
    if isinstance(addresses, str) or not isinstance(addresses, Sequence):
        raise TypeError(
            "`addresses` must be a list of workers' addresses, such as "
            f'["10.0.0.2:2222"]; got {addresses!r}.'
        )
    if not addresses:
        raise ValueError(
            "`addresses` is empty, but a cluster has at least one worker. "
            "Start one by `python -m towers worker --port=2222`."
        )
    for name, value in (("timeout", timeout), ("heartbeat", heartbeat)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` must be seconds; got {value!r}.")
        if not value > 0:
            raise ValueError(
                f"`{name}` must be more than 0 seconds; got {value}."
            )
    workers = [
        Address.parse(text, f"addresses[{i}]")
        for i, text in enumerate(addresses)
    ]
    targets = [worker.target for worker in workers]
    twice = {text for text in targets if targets.count(text) > 1}
    if twice:
        raise ValueError(
            f"`addresses` names {', '.join(sorted(twice))} twice. Expected "
            "each worker once."
        )
    return workers
