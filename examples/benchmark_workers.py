"""Towers in processes of their own against MultiWorkerMirroredStrategy.

    python examples/benchmark_workers.py --model=lstm --rounds=7 --steps=10

Two worker processes, pinned to a core each, compute the halves of a batch. Ways:

- plain: the model in one process on one core, which all are compared with;
- chief: this machine's third process has the parameters, both workers a tower;
- ahead: the same with `prefetch=True`;
- loss: the same with `loss_on_towers="auto"`;
- balanced: parameters on the two workers;
- given, read, readloss: `fit` itself, given a dataset on the chief, or one on each
  worker by `towers.per_tower`, the last with `loss_on_towers="auto"`;
- self, selfloss: the chief is a tower itself, beside one worker;
- mirrored: `MultiWorkerMirroredStrategy`, a loop with `strategy.run`, since Keras
  3's `fit` does not run under it.

Told are milliseconds a step, their ratio to plain with quartiles over interleaved
rounds, CPU milliseconds a step of each process (the chief's first), transfers and
bytes a step. Needs Linux and two cores that nobody else uses.
"""

import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import benchmark_models
import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
WAYS = [
    *("plain", "chief", "ahead", "loss", "balanced"),
    *("given", "read", "readloss"),
    *("self", "selfloss", "mirrored"),
]
flags.DEFINE_string("model", "pooled", "What is trained.")
flags.DEFINE_list("ways", WAYS, "How; plain comes first.")
flags.DEFINE_integer("rounds", 7, "Interleaved rounds.", lower_bound=1)
flags.DEFINE_integer("steps", 10, "Steps per round.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Rows of the global batch.", lower_bound=2)
flags.DEFINE_integer("width", 32, "Of the model's layers.", lower_bound=1)
flags.DEFINE_string("json", None, "Where to write all numbers.")


def pinned(core: int) -> Any:
    """TensorFlow, in a process on one core, with one thread for an op."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.sched_setaffinity(0, {core})
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    return tf


def served(connection: Any, steps: Callable[[int], None], about: Any) -> None:
    """Takes as many steps as it is told, and tells seconds a step."""
    steps(3)
    connection.send("ready")
    while count := connection.recv():
        start = time.perf_counter()
        steps(count)
        connection.send((time.perf_counter() - start) / count)
    connection.send(about())


def worker(ports: list[int], index: int, core: int) -> None:
    """A server that never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it prints what it is
    tf = pinned(core)
    spec = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{p}" for p in ports]})
    tf.distribute.Server(spec, job_name="worker", task_index=index).join()


def fitted(
    connection: Any, name: str, way: str, size: tuple[int, int], ports: Any
) -> None:
    """The plain model, or towers: stock `fit` steps."""
    if way == "plain" or way.startswith("self"):
        pinned(0)
    import tensorflow as tf

    import towers

    width, batch = size
    model = benchmark_models.ALL[name](width)
    data = benchmark_models.batches(model, batch)
    if way != "plain":
        spec = tf.train.ClusterSpec(
            {"worker": [f"127.0.0.1:{port}" for port in ports]}
        )
        tf.config.experimental_connect_to_cluster(spec)
        devices = [f"/job:worker/task:{i}/device:CPU:0" for i in range(2)]
        if way.startswith("self"):
            devices[0] = "/job:localhost/task:0/device:CPU:0"
        policy = towers.balanced(devices)
        placement = towers.Placement(
            devices, policy if way == "balanced" else "/CPU:0"
        )
        auto = "auto" if way.endswith("loss") else False
        model = towers.TowerModel(
            model, placement, loss_on_towers=auto, prefetch=way == "ahead"
        )
    model = benchmark_models.compiled(model)
    if way.startswith("read"):
        data = towers.per_tower(
            lambda i: benchmark_models.batches(model.template, batch // 2)
        )

    def fit(count: int) -> None:
        model.fit(data, steps_per_epoch=count, verbose=0, shuffle=False)

    if way in ("given", "read", "readloss"):
        steps = fit
    else:
        model.make_train_function()
        batches = iter(data)

        def steps(count: int) -> None:
            for _ in range(count):
                logs = model.train_function(batches)
            float(logs["loss"])

    def about() -> list[int] | None:
        if way == "plain":
            return None
        report = towers.execution_report(fit, 1)
        return [len(report.transfers), report.total_bytes]

    served(connection, steps, about)


def mirrored(
    connection: Any, name: str, index: int, size: tuple[int, int], ports: Any
) -> None:
    """One of the two workers of a MultiWorkerMirroredStrategy."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    tf = pinned(index)
    import keras

    width, batch = size
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = benchmark_models.ALL[name](width)
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy()
    batches = iter(benchmark_models.batches(model, batch // 2).prefetch(1))

    @tf.function
    def step(batches: Any) -> Any:
        def one(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True)) / 2
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return value

        return strategy.run(one, next(batches))

    def steps(count: int) -> None:
        for _ in range(count):
            value = step(batches)
        float(strategy.experimental_local_results(value)[0])

    served(connection, steps, lambda: None)


class Contender:
    """The processes of one way, which idle while others are measured."""

    def __init__(self, way: str):
        self.context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.connections: list[Any] = []
        ports, size = _free_ports(), (FLAGS.width, FLAGS.batch)
        if way == "mirrored":
            for i in range(2):
                self.start(mirrored, FLAGS.model, i, size, ports)
        else:
            self.start(fitted, FLAGS.model, way, size, ports)
            for i in [] if way == "plain" else range(2):
                server = self.context.Process(
                    target=worker, args=(ports, i, i), daemon=True
                )
                server.start()
                self.processes.append(server)
        for connection in self.connections:
            connection.recv()

    def start(self, target: Callable[..., None], *args: Any) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(
            target=target, args=(there, *args), daemon=True
        )
        process.start()
        self.processes.append(process)
        self.connections.append(here)

    def round(self, steps: int) -> tuple[float, list[float]]:
        """Seconds a step, and CPU seconds a step of each process."""
        before = [_cpu(process.pid) for process in self.processes]
        for connection in self.connections:
            connection.send(steps)
        seconds = max(connection.recv() for connection in self.connections)
        after = [_cpu(process.pid) for process in self.processes]
        return seconds, [(b - a) / steps for a, b in zip(before, after)]

    def close(self) -> Any:
        """Ends the processes; [transfers, bytes] of a step, where known."""
        for connection in self.connections:
            connection.send(0)
        about = [connection.recv() for connection in self.connections]
        for process in self.processes:
            process.kill()
        return about[0]


def _free_ports() -> list[int]:
    """Two that nobody has, nor is given for a connection before they are used."""
    ports: list[int] = []
    while len(ports) < 2:
        with socket.socket() as probe:
            port = random.randrange(10_000, 30_000)
            if probe.connect_ex(("127.0.0.1", port)) and port not in ports:
                ports.append(port)
    return ports


def _cpu(process: int) -> float:
    """Seconds of CPU that a process has used."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(_: list[str]) -> None:
    contenders = {way: Contender(way) for way in FLAGS.ways}
    rounds: dict[str, list[Any]] = {way: [] for way in contenders}
    for i in range(FLAGS.rounds + 1):
        for way in list(contenders)[:: 1 if i % 2 else -1]:
            one = contenders[way].round(FLAGS.steps)
            if i:  # the first round warms up
                rounds[way].append(one)
    results = {}
    first = np.array([seconds for seconds, _ in rounds[FLAGS.ways[0]]])
    print(f"{FLAGS.model}, times over {FLAGS.ways[0]}")
    for way, each in rounds.items():
        seconds = np.array([one for one, _ in each])
        cpu = np.median([used for _, used in each], 0) * 1e3
        ratio = np.quantile(seconds / first, [0.5, 0.25, 0.75])
        crossed = contenders[way].close()
        results[way] = {
            "step_seconds": float(np.median(seconds)),
            "ratio": ratio.tolist(),
            "cpu_milliseconds": cpu.tolist(),
            "transfers_and_bytes": crossed,
        }
        shown = (
            ""
            if crossed is None
            else "  {} transfers, {:,} bytes".format(*crossed)
        )
        print(
            f"{way:9} {np.median(seconds) * 1e3:7.1f} ms  "
            "{:.2f} ({:.2f} to {:.2f})".format(*ratio)
            + f"  CPU {', '.join(f'{x:.1f}' for x in cpu)} ms{shown}",
            flush=True,
        )
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump({"model": FLAGS.model, "ways": results}, file, indent=1)


if __name__ == "__main__":
    app.run(main)
