"""Towers against the plain model, MirroredStrategy and split-and-concat.

    python examples/benchmark.py --workers --json=bench.json --svg=bench.svg

For a CNN, an LSTM, a small ResNet and an embedding model, all trained by stock
`fit` steps with the same global batch, on GPUs if there are any, else on logical
CPU devices, it measures

- step time: contenders on as many devices in one process, in interleaved rounds;
- first step, from compiling to its end, and the peak memory of the host: in a
  fresh process each;
- transfers and bytes a step, from `towers.execution_report`; where that cannot
  tell, the JSON says why;
- with --workers, step time with each tower in a process of its own, pinned to a
  core, against one such tower; benchmark_workers.py tells more of those.
- with --kinds=towers,plain,towers_jit,plain_jit,balanced,towers_quick, an XLA
  program per tower, parameters on all devices, and quick starts.

A ratio is the median, with quartiles, of the ratios of the rounds: below 1.0
towers are faster. --svg draws them (`pip install matplotlib`). --quick is for
testing this file.
"""

import concurrent.futures
import json
import multiprocessing
import os
import platform
import resource
import socket
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import benchmark_models
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import towers

FLAGS = flags.FLAGS
KINDS = ["plain", "towers", "mirrored", "classic"]
MORE = ["plain_jit", "towers_jit", "towers_quick", "balanced"]
flags.DEFINE_list("models", list(benchmark_models.MODELS), "What is trained.")
flags.DEFINE_list("towers", ["1", "2", "4", "8"], "Numbers of towers.")
flags.DEFINE_list("kinds", KINDS, f"Ways of training; {MORE} are known, too.")
flags.DEFINE_integer("rounds", 15, "Interleaved rounds.", lower_bound=1)
flags.DEFINE_integer("steps", 8, "Steps per round.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Rows of the global batch.", lower_bound=1)
flags.DEFINE_integer("width", 32, "Of the models' layers.", lower_bound=1)
flags.DEFINE_boolean("workers", False, "Also measure worker processes.")
flags.DEFINE_boolean("quick", False, "Tiny models, few rounds.")
flags.DEFINE_string("json", None, "Where to write all numbers.")
flags.DEFINE_string("svg", None, "Where to draw the ratios; needs Matplotlib.")

HEAD = f"{'':12}   ms/step  first s  peak MB  transfers  kB a step"
Contender = tuple[str, int]  # kind, number of devices


def contenders(n: int) -> list[Contender]:
    """Who is measured against whom on n devices; the plain model needs one."""
    several = ["mirrored", "classic", "towers_jit", "towers_quick", "balanced"]
    others = [] if n == 1 else [(kind, n) for kind in several]
    everyone = [("towers", n), ("plain", 1), ("plain_jit", 1), *others]
    return [one for one in everyone if one[0] in FLAGS.kinds]


def devices(n: int) -> list[str]:
    """The first n GPUs, or logical CPUs; this starts TensorFlow."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    place = towers.Placement.gpus if gpus else towers.Placement.cpus
    return list(place(n).devices)


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Calls it in a new process, where TensorFlow has not started."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def first_step(name: str, one: Contender, width: int, batch: int) -> list:
    """[seconds from compiling to the end of the first step, peak bytes]."""
    make, (kind, n) = benchmark_models.ALL[name], one
    names = devices(n)
    data = benchmark_models.batches(make(width), batch)
    start = time.perf_counter()
    model = benchmark_models.contender(kind, lambda: make(width), names)
    model.fit(data, steps_per_epoch=1, verbose=0, shuffle=False)
    seconds = time.perf_counter() - start
    return [seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]


def crossed(model: keras.Model, data: tf.data.Dataset) -> list:
    """[transfers, bytes, why not] of a step."""
    try:
        with warnings.catch_warnings(record=True):
            report = towers.execution_report(
                lambda: model.fit(
                    data, steps_per_epoch=1, verbose=0, shuffle=False
                )
            )
    except RuntimeError as reason:
        return [None, None, str(reason)]
    if any(op.startswith("Collective") for _, op in report.ops):
        return [None, None, "collective ops move bytes that no graph tells of"]
    if report.unknown:
        return [None, None, f"{len(report.unknown)} of unknown size"]
    return [len(report.transfers), report.total_bytes, None]


def interleaved(
    models: dict[Any, keras.Model],
    data: tf.data.Dataset,
    rounds: int,
    steps: int,
) -> dict[Any, list[float]]:
    """Seconds a step of each model, in each round."""
    batches = {}
    for key, model in models.items():
        model.fit(data, steps_per_epoch=2, verbose=0, shuffle=False)
        strategy = model.distribute_strategy
        spread = isinstance(strategy, tf.distribute.MirroredStrategy)
        batches[key] = iter(
            strategy.experimental_distribute_dataset(data) if spread else data
        )
    times: dict[Any, list[float]] = {key: [] for key in models}
    for i in range(rounds + 1):
        for key in list(models)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            for _ in range(steps):
                logs = models[key].train_function(batches[key])
            float(logs["loss"])  # wait for it
            if i:  # the first round warms up
                times[key].append((time.perf_counter() - start) / steps)
    return times


def ratio(times: dict[Any, list[float]], a: Any, b: Any) -> list[float]:
    """[median, lower, upper quartile] of the ratios of the rounds."""
    ratios = np.divide(times[a], times[b])
    return [float(q) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]


def measure(name: str, contenders: list[Contender], quick: bool) -> dict:
    """All that is told of one model."""
    width, batch = (2, 8) if quick else (FLAGS.width, FLAGS.batch)
    rounds, steps = (2, 1) if quick else (FLAGS.rounds, FLAGS.steps)
    make = benchmark_models.ALL[name]
    names = devices(max(n for _, n in contenders))
    models = {
        (kind, n): benchmark_models.contender(
            kind, lambda: make(width), names[:n]
        )
        for kind, n in contenders
    }
    data = benchmark_models.batches(make(width), batch)
    times = interleaved(models, data, rounds, steps)
    rows = []
    for one, model in models.items():
        first, peak = fresh(first_step, name, one, width, batch)
        transfers, crossing, reason = crossed(model, data)
        step = float(np.median(times[one]))
        rows.append(
            {
                "kind": one[0],
                "devices": one[1],
                "step_seconds": step,
                "first_step_seconds": first,
                "peak_bytes": peak,
                "transfers": transfers,
                "bytes": crossing,
                "why_not": reason,
            }
        )
        shown = "        ?          ?"
        if reason is None:
            shown = f"{transfers:9,}  {crossing / 1e3:9,.0f}"
        print(
            f"{' '.join(map(str, one)):12}  {step * 1e3:8.1f}  {first:7.2f}  "
            f"{peak / 1e6:7.0f}  {shown}",
            flush=True,
        )
    ratios = {
        f"{a[0]} {a[1]} / {b[0]} {b[1]}": ratio(times, a, b)
        for a in contenders
        for b in contenders
        if a[0] == "towers" and b[0] != "towers"
    }
    return {"contenders": rows, "ratios": ratios}


def worker(cluster: dict[str, list[str]], index: int, core: int) -> None:
    """A server on one core that never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it prints what it is
    os.sched_setaffinity(0, [core])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    spec = tf.train.ClusterSpec(cluster)
    tf.distribute.Server(spec, job_name="worker", task_index=index).join()


def chief(cluster: dict[str, list[str]], quick: bool) -> list[float]:
    """One worker's step time over that of two: [median, quartiles]."""
    tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(cluster))
    names = [f"/job:worker/task:{i}/device:CPU:0" for i in range(2)]
    width, batch = (2, 8) if quick else (32, 256)
    models = {
        n: benchmark_models.contender(
            "towers", lambda: benchmark_models.pooled(width), names[:n]
        )
        for n in (1, 2)
    }
    data = benchmark_models.batches(benchmark_models.pooled(width), batch)
    times = interleaved(models, data, *((2, 1) if quick else (9, 2)))
    return ratio(times, 1, 2)


def workers(quick: bool) -> list[float]:
    """How many times as fast two pinned worker processes are as one."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    servers = [
        context.Process(target=worker, args=(cluster, i, cores[i % len(cores)]))
        for i in range(2)
    ]
    for server in servers:
        server.start()
    try:
        speedup = fresh(chief, cluster, quick)
    finally:
        for server in servers:
            server.kill()
    print(
        "\ntwo workers, times as fast as one: {:.2f} ({:.2f} to {:.2f})".format(
            *speedup
        )
    )
    return speedup


def machine() -> dict[str, Any]:
    """What the numbers come from."""
    with open("/proc/cpuinfo") as lines:
        cpus = [x.split(":")[1].strip() for x in lines if "model name" in x]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpus[0] if cpus else platform.processor(),
        "gpus": len(tf.config.list_physical_devices("GPU")),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def draw(models: dict[str, Any], path: str) -> None:
    """A bar per ratio, with its quartiles, and a line at 1."""
    from matplotlib import figure, rc_context

    bars = [
        (f"{name}: {label}", *quartiles)
        for name, one in models.items()
        for label, quartiles in one["ratios"].items()
    ][::-1]
    labels, medians, lower, upper = zip(*bars)
    rows = range(len(bars))
    # Letters stay letters, and the same numbers give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "towers"}):
        picture = figure.Figure((8.0, 0.8 + 0.24 * len(bars)))
        axes = picture.subplots()
        axes.barh(rows, medians, color="#7aa6c2")
        axes.hlines(rows, lower, upper, color="#222222", linewidth=2)
        for row, median, high in zip(rows, medians, upper):
            axes.text(high + 0.01, row, f"{median:.2f}", va="center")
        axes.axvline(1.0, color="#cc3333", linestyle="--")
        axes.set_yticks(rows, labels)
        axes.set_xlabel(
            "step time of towers over the other's; "
            "left of the line towers are faster"
        )
        axes.margins(y=0.02)
        axes.set_xlim(0.0, max(1.25, *upper) * 1.05)
        picture.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main(_: list[str]) -> None:
    counts = sorted(int(n) for n in FLAGS.towers)
    gpus = len(tf.config.list_physical_devices("GPU"))
    counts = [n for n in counts if n <= (gpus or n)]
    models: dict[str, dict] = {}
    for name in FLAGS.models:
        models[name] = {"contenders": [], "ratios": {}}
        print(f"\n{name}\n{HEAD}", flush=True)
        for n in counts:
            # A process can only have collectives of one group of devices.
            some = fresh(measure_here, name, contenders(n), sys.argv)
            models[name]["contenders"] += some["contenders"]
            models[name]["ratios"].update(some["ratios"])
        for label, quartiles in models[name]["ratios"].items():
            print("{}: {:.3f} ({:.3f} to {:.3f})".format(label, *quartiles))
    result = {"machine": machine(), "models": models}
    if FLAGS.workers:
        result["two workers over one"] = workers(FLAGS.quick)
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(result, file, indent=1)
    if FLAGS.svg:
        draw(models, FLAGS.svg)
    print("\n{cpu}, {cores} cores, TensorFlow {tensorflow}".format(**machine()))


def measure_here(
    name: str, contenders: list[Contender], argv: list[str]
) -> dict:
    """`measure`, in a process of its own, with the same flags."""
    FLAGS(argv)
    return measure(name, contenders, FLAGS.quick)


if __name__ == "__main__":
    app.run(main)
