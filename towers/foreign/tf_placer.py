"""tf_placer: where TensorFlow would put a graph on machines that are not here.

TensorFlow has no word for that. But its master, in a process that has a Session,
places and cuts a graph for whatever devices a worker says it has, and asks for no
more than that before it registers the parts. So workers that say so, and run
nothing, stand for the machines. What one is asked and answers are TensorFlow's own
messages: `DeviceAttributes` and `GraphDef`, of `tensorflow.core`, and those of
`worker.proto`, of which the wheel has no Python. `tf_placer_test.py` fails when
one of them changes.
"""

import functools
import importlib
import itertools
import re
import socket
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import device_attributes_pb2
from tensorflow.python.framework import op_def_registry

from towers.foreign.tf_nodes import (
    RECEIVES,
    SENDS,
    all_nodes,
    library,
    rendezvous,
    source,
)

v1 = tf.compat.v1

# By this job a process calls its own devices.
JOB = "/job:localhost/replica:0/task:0"
_RUNS_NOTHING = "towers: a machine in name only"
_MEMORY = 16 << 30  # of each device, in bytes; nothing is stored
_REFUSAL = re.compile(
    r"(?:for operation |\{\{node |\{\{colocation_node )([^\s}:]+)"
)
_incarnations = itertools.count(1)
_lock = threading.Lock()


def placed(
    graph: Any,
    targets: Sequence[str],
    machines: Mapping[str, Mapping[str, int]],
    strict: bool,
) -> Any:
    """A graph, each node with its device, and functions put in their callers' place.

    Args:
      graph: a `GraphDef`, of whose nodes some have devices.
      targets: names of nodes; what none of them needs is left out.
      machines: by task, `JOB` among them, how many devices it has of each type.
      strict: whether an op must be where it was asked to be.

    Returns:
      A `GraphDef`, in which nothing is sent or received yet.

    Raises:
      tf.errors.InvalidArgumentError: no placement is possible.
    """
    config = v1.ConfigProto(
        allow_soft_placement=not strict,
        device_filters=["/job:localhost", "/job:worker"],
    )
    # As it was made: what becomes of an op is for the machine itself to say.
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    config.graph_options.optimizer_options.do_function_inlining = True
    names = {node.name for node in graph.node}
    graph = _elsewhere(graph)
    with _lock:
        workers, master = _master(tuple(machines))
        for worker, (task, machine) in zip(workers, machines.items()):
            worker.devices = list(_attributes(task, machine))
            worker.graphs = []
        answer = master.ask(
            "CreateSession",
            _field(1, graph.SerializeToString()),
            _field(2, config.SerializeToString()),
        )
        session = _field(1, dict(_fields(answer))[1])
        try:
            answer = master.ask(
                "RunStep",
                session,
                *(_field(4, target.encode()) for target in targets),
                bytes([7 << 3, True]),  # long errors belong into the answer
            )
            fields = dict(_fields(answer))
            if 3 in fields:  # the code of an error; its message is 4
                raise _error(fields[3], fields.get(4, b"").decode())
        except tf.errors.AbortedError as error:
            if _RUNS_NOTHING not in str(error):
                raise
        finally:
            master.ask("CloseSession", session)
        return _joined([g for worker in workers for g in worker.graphs], names)


def refused(error: tf.errors.OpError) -> str | None:
    """The op that a refusal is about, by name; None if it names none."""
    match = _REFUSAL.search(error.message)
    return match[1] if match else None


def _elsewhere(graph: Any) -> Any:
    """The graph, all of it on those machines, and nothing on the master.

    What has no device is on this process's, but for what works on a resource: that
    is where the resource is.
    """
    copy = v1.GraphDef()
    copy.CopyFrom(graph)
    machine = tf.DeviceSpec.from_string(JOB)
    devices: dict[str, str] = {}
    for node in all_nodes(copy):
        if not node.device and _takes_resource(node.op):
            continue
        if node.device not in devices:
            spec = machine.make_merged_spec(
                tf.DeviceSpec.from_string(node.device)
            )
            devices[node.device] = spec.to_string()
        node.device = devices[node.device]
    return copy


@functools.cache
def _takes_resource(kind: str) -> bool:
    definition = op_def_registry.get(kind)
    return definition is not None and any(
        x.type == tf.resource.as_datatype_enum for x in definition.input_arg
    )


def _joined(parts: Sequence[Any], names: Container[str]) -> Any:
    """Parts as one graph again, as it was before it was cut between tasks.

    Args:
      parts: `GraphDef`s, a task's each.
      names: of the nodes that were there before.
    """
    nodes = {node.name: node for part in parts for node in part.node}
    sent = {
        rendezvous(node): node for node in nodes.values() if node.op in SENDS
    }
    passed: dict[str, str] = {}  # what each node that was added stands for
    for node in nodes.values():
        if node.op in (*SENDS, *RECEIVES):
            passed[node.name] = sent[rendezvous(node)].input[0]
        value = node.input[0] if node.input else ""
        made_for = nodes.get(source(value))
        if node.name in names or made_for is None:
            continue
        if node.op == "Identity" and made_for.op in RECEIVES:
            passed[node.name] = value
    for send in sent.values():  # to wait for a node, an empty constant is sent
        empty = nodes[source(send.input[0])]
        if empty.name in names or empty.op != "Const" or not empty.input:
            continue
        # One that a function has is none, and waits too.
        if 0 in (d.size for d in empty.attr["value"].tensor.tensor_shape.dim):
            passed[empty.name] = empty.input[0]
    whole = v1.GraphDef()
    whole.library.function.extend(library(*parts).values())
    for node in nodes.values():
        if node.name not in passed:
            inputs = [_behind(name, passed) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
            whole.node.append(node)
    return whole


def _behind(name: str, passed: Mapping[str, str]) -> str:
    """The input behind the nodes that were added on its way."""
    waits = name.startswith("^")
    while (own := source(name)) in passed:
        name = passed[own]
    return f"^{own}" if waits else name


def _attributes(task: str, machine: Mapping[str, int]) -> Iterator[bytes]:
    """What a worker says of each of its devices."""
    for kind, count in machine.items():
        for i in range(count):
            yield device_attributes_pb2.DeviceAttributes(
                name=f"{task}/device:{kind}:{i}",
                device_type=kind,
                memory_limit=_MEMORY,
                incarnation=next(_incarnations),
            ).SerializeToString()


class _Worker:
    """A worker that has devices in name, and keeps the graphs it is given.

    Attributes:
      devices: serialized `DeviceAttributes`.
      graphs: what was registered, a `GraphDef` each.
    """

    def __init__(self) -> None:
        grpc = importlib.import_module("grpc")  # TensorFlow brings it
        self.devices: list[bytes] = []
        self.graphs: list[Any] = []
        self._aborted = grpc.StatusCode.ABORTED

        class Handler(grpc.GenericRpcHandler):  # type: ignore[name-defined]
            def service(handler, details: Any) -> Any:
                method = details.method.rsplit("/", 1)[-1]
                return grpc.unary_unary_rpc_method_handler(
                    functools.partial(self._answer, method)
                )

        self._server = grpc.server(
            futures.ThreadPoolExecutor(2),
            handlers=[Handler()],
            options=[("grpc.max_receive_message_length", -1)],
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _answer(self, method: str, request: bytes, context: Any) -> bytes:
        if method == "GetStatus":
            return b"".join(_field(1, device) for device in self.devices)
        if method == "RegisterGraph":
            self.graphs += [
                v1.GraphDef.FromString(value)
                for number, value in _fields(request)
                if number == 2
            ]
            return _field(1, b"graph %d" % len(self.graphs))
        if method == "RunGraph":
            context.abort(self._aborted, _RUNS_NOTHING)
        return b""


class _Master:
    """A master in this process, which knows some workers.

    Args:
      ports: of those, by task.
    """

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._grpc = importlib.import_module("grpc")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs: dict[str, Any] = {"master": {0: f"127.0.0.1:{port}"}}
        for name, worker in ports.items():
            task = tf.DeviceSpec.from_string(name)
            jobs.setdefault(task.job, {})[task.task] = f"127.0.0.1:{worker}"
        self._server = tf.distribute.Server(
            tf.train.ClusterSpec(jobs),
            job_name="master",
            config=v1.ConfigProto(device_count={"CPU": 1, "GPU": 0}),
        )
        self._channel = self._grpc.insecure_channel(
            f"127.0.0.1:{port}",
            options=[("grpc.max_receive_message_length", -1)],
        )

    def ask(self, method: str, *fields: bytes) -> bytes:
        """The master's answer to a message of these fields.

        Raises:
          tf.errors.OpError: what it says is wrong.
        """
        call = self._channel.unary_unary(f"/tensorflow.MasterService/{method}")
        try:
            answer: bytes = call(b"".join(fields))
            return answer
        except self._grpc.RpcError as error:
            raise _error(error.code().value[0], error.details()) from None


def _error(code: int, message: str) -> Exception:
    kind = v1.errors.exception_type_from_error_code(code)
    error: Exception = kind(None, None, message)
    return error


@functools.cache
def _master(tasks: tuple[str, ...]) -> tuple[list[_Worker], _Master]:
    """Workers, and the master that knows them: kept, as none of them ends."""
    workers = [_Worker() for _ in tasks]
    ports = {task: worker.port for task, worker in zip(tasks, workers)}
    return workers, _Master(ports)


def _field(number: int, value: bytes) -> bytes:
    """A field of a message: its number, the length, the bytes."""
    length, digits = len(value), []
    while length > 127:
        digits.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *digits, length]) + value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message by number: those of a length, and integers."""
    at = 0

    def number() -> int:
        nonlocal at
        shift = value = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
        else:
            size = number() if kind == 2 else {1: 8, 5: 4}[kind]
            if kind == 2:
                yield key >> 3, message[at : at + size]
            at += size
