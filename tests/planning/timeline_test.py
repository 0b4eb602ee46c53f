"""timeline: by hand, and of what ran."""

import collections
import html
import json
import os
import re
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from models import DEVICES, chain, cnn, inputs, make, targets

import towers
from towers.placement.scopes import tower_of
from towers.planning.timeline import Timeline
from towers.planning.trace_events import trace_events
from towers.planning.waits import Wait
from towers.report.profile import Crossing, Op

A, B = DEVICES[:2]
BY_HAND = Timeline(
    devices=(A, B),
    ops=(
        Op(A, "tower_0/block/a", "Conv2D", 10.0, 4.0),
        Op(A, "tower_0/block/b", "Relu", 12.0, 3.0),
        Op(B, "tower_1/block/a", "Conv2D", 13.0, 3.0),
        Op(A, "gather", "ConcatV2", 17.0, 1.0),
    ),
    crossings=(
        Crossing(A, B, "shard", 10.5, 11.0, 12.5, 64, "batch"),
        Crossing(B, A, "output", 10.0, 16.0, 16.5),
    ),
    start=10.0,
    seconds=8.0,
)


def checked(page):
    """The rules of the format that a viewer trips over."""
    lanes = collections.defaultdict(list)
    arrows = collections.defaultdict(list)
    for event in page["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= set(event), event
        assert event["ph"] in "MXsf", event
        if event["ph"] == "M":
            assert event["args"].keys() <= {"name", "sort_index"}
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            span = event["ts"], event["ts"] + event["dur"]
            lanes[event["pid"], event["tid"]].append(span)
        else:
            arrows[event["id"]].append(event)
    # Perfetto takes threads of one number, or that of a process, for one.
    numbers = [n for _, n in lanes] + list({n for n, _ in lanes})
    assert len({0, *numbers}) == 1 + len(numbers), numbers
    for lane, spans in lanes.items():  # Perfetto drops what overlaps
        for one, other in zip(sorted(spans), sorted(spans)[1:]):
            assert one[1] < other[0], (lane, one, other)
    for start, end in arrows.values():
        assert (start["ph"], end["ph"]) == ("s", "f")
        assert start["ts"] <= end["ts"]
        for event in (start, end):  # an arrow ends in a box
            spans = lanes[event["pid"], event["tid"]]
            assert any(a <= event["ts"] <= b for a, b in spans), event
    return lanes, arrows


class ByHandTest(absltest.TestCase):
    def test_notebooks_show_answers_and_a_drawing(self):
        shown = BY_HAND._repr_html_()
        self.assertIn("<dt>Busiest device</dt>", shown)
        self.assertIn(f"<dd>{A}, 6,000.000 ms (75% of the time)</dd>", shown)
        self.assertIn(
            "<title>tower_0/block forward: 5,000.000 ms, 2 ops<", shown
        )

    def test_a_page(self):
        path = os.path.join(tempfile.mkdtemp(), "step.html")
        BY_HAND.save(path)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        shown = html.unescape(re.sub("<[^>]+>", "|", text))
        for answer in (
            f"|Longest wait||{B}, 2,500.000 ms for batch of {A}|",
            "|Crossed||64 B in 2 transfers, 1 of unknown size|",
            "|Two towers or more at once||2,000.000 ms (25% of the time)|",
            "|Longest layer||tower_0/block forward, 7,000.000 ms in all its ops|",
        ):
            self.assertIn(answer, shown)
        self.assertIn('<p class="subject">', text)
        self.assertNotIn("<script src", text)

    def test_busy_overlap_and_waits(self):
        self.assertEqual(BY_HAND.busy, {A: 6.0, B: 3.0})
        self.assertEqual(BY_HAND.towers, {"tower_0": 5.0, "tower_1": 3.0})
        self.assertEqual(BY_HAND.overlap, 2.0)
        self.assertEqual(BY_HAND.waits, {A: 1.5, B: 2.5})
        self.assertEqual(
            BY_HAND.longest_waits,
            (
                Wait(B, "shard", A, 2.5, 0.0, "batch"),
                Wait(A, "output", B, 1.5, 5.0),
            ),
        )
        self.assertIn(f"{B} waited for batch of {A}", str(BY_HAND))
        self.assertRegex(str(BY_HAND), rf"6000.000 ms +75.0%  {A} busy")

    def test_the_format_of_traces(self):
        t = BY_HAND
        events = trace_events(t.devices, t.ops, t.crossings, t.start)
        lanes, arrows = checked(events)
        # Below tower, pass and layer of A two of its ops, which ran at once.
        own = sorted(tid - 10_000 for pid, tid in lanes if pid == 1)
        self.assertEqual(own, [0, 1000, 2000, 3000, 3001, 4000, 5000])
        self.assertLen(arrows, 2)
        boxes = {
            (e["name"], e.get("dur"), e["args"].get("ops"))
            for e in events["traceEvents"]
            if e["ph"] == "X"
        }
        self.assertContainsSubset(
            {
                ("tower_0", 5e6, 2),
                ("tower_0 forward", 5e6, 2),
                ("tower_1/block forward", 3e6, 1),
            },
            boxes,
        )
        sent = [
            e["args"]
            for e in events["traceEvents"]
            if e["ph"] == "X" and e["name"] == "shard"
        ]
        arguments = {"from": A, "to": B, "bytes": 64, "holds": "batch"}
        self.assertEqual(sent, [arguments, arguments])


class TimelineTest(absltest.TestCase):
    def test_a_step_of_keras(self):
        model = towers.TowerModel(make(cnn), towers.Placement([A, B]))
        model.compile("sgd", "mse")
        x, y = inputs(model, 6), targets(model, 6)
        before = [w.copy() for w in model.get_weights()]
        measured = towers.timeline(model.train_on_batch, x, y)
        for one, other in zip(before, model.get_weights()):
            np.testing.assert_array_equal(one, other)
        self.assertEqual(measured.devices, (A, B))
        self.assertEqual(list(measured.towers), ["tower_0", "tower_1"])
        report = towers.execution_report(model.train_on_batch, x, y)
        convolutions = {
            (d, name) for d, name, kind in report.nodes if "Conv2D" in kind
        }
        self.assertLen(convolutions, 4)
        self.assertContainsSubset(
            convolutions, {(op.device, op.name) for op in measured.ops}
        )
        sizes = sorted(c.bytes for c in measured.crossings)
        self.assertEqual(sizes, sorted(t.bytes for t in report.transfers))
        crossed = collections.Counter(
            (c.source, c.target) for c in measured.crossings
        )
        self.assertEqual(
            crossed,
            collections.Counter((t.source, t.target) for t in report.transfers),
        )
        in_fit = towers.timeline(model.fit, x, y, batch_size=3, verbose=0)
        names = collections.Counter(tower_of(op.name) for op in in_fit.ops)
        for _, name in convolutions:  # two steps
            self.assertEqual(names[tower_of(name)], 2)
        calls = [c.tensor for c in in_fit.crossings if "Call/" in c.tensor]
        self.assertEmpty(calls)  # of Keras's function, in which a step is one
        for device in (A, B):
            idle = (
                measured.seconds
                - measured.busy[device]
                - measured.waits[device]
            )
            self.assertGreater(idle, -1e-6)
        path = os.path.join(tempfile.mkdtemp(), "step.json")
        measured.save(path)
        with open(path) as file:
            _, arrows = checked(json.load(file))
        self.assertLen(arrows, len(measured.crossings))
        self.assertStartsWith(
            measured.subject, f"{model.name}.train_on_batch of "
        )

    def test_a_session(self):
        v1 = tf.compat.v1
        model = make(cnn)
        with tf.Graph().as_default():
            x = v1.placeholder(tf.float32, [None, *model.input_shape[1:]])
            graph = towers.build_towers(model, x, towers.Placement([A, B]))
            feeds = {x: np.ones([4, *model.input_shape[1:]])}
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                measured = towers.timeline(session.run, graph.outputs, feeds)
            self.assertLen(measured.towers, 2)
            with v1.train.MonitoredTrainingSession() as session:
                measured = towers.timeline(session.run, graph.outputs, feeds)
            self.assertLen(measured.towers, 2)
            self.assertIn(B, [w.device for w in measured.longest_waits])

    def test_nothing_to_tell_is_refused(self):
        with self.assertRaisesRegex(TypeError, "train_on_batch"):
            towers.timeline(3)
        with self.assertRaisesRegex(RuntimeError, "no op in a graph"):
            towers.timeline(lambda: tf.ones([2]) + 1.0)

    @pytest.mark.rare
    def test_shares_of_three_to_one(self):
        """Busy 3 to 1, and in all what the system accounts, on one thread."""
        done = subprocess.run(
            [sys.executable, __file__, "three_to_one"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        ratio, accounted, waits = json.loads(done.stdout.splitlines()[-1])
        self.assertBetween(ratio, 3 * 0.8, 3 * 1.2)
        self.assertBetween(accounted, 0.85, 1.15)
        self.assertRegex(waits, r"/CPU:\d waited for .* of /CPU:\d")


def three_to_one():
    """Prints medians: what is asserted must not be one unlucky step's."""
    import time

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    placement = towers.Placement.cpus(2, weights=[3, 1])
    layers = keras.layers
    model = chain(
        [32, 32, 16],
        layers.Conv2D(64, 3, activation="relu"),
        layers.Conv2D(64, 3, activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
    )
    model = towers.TowerModel(model, placement)
    model.compile("sgd", "mse")
    x, y = np.ones([64, 32, 32, 16], "float32"), np.ones([64, 4], "float32")
    step = model.make_train_function() or model.train_function
    data = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    cpu = []

    def timed():
        start = time.process_time(), time.perf_counter()
        step(data)
        cpu.append(
            (time.process_time() - start[0], time.perf_counter() - start[1])
        )

    ratios, accounted = [], []
    for _ in range(4):
        measured = towers.timeline(timed)
        ratios.append(measured.busy[A] / measured.busy[B])
        # On a machine that others use, too, a thread that computes does not
        # have the processor all the time.
        used, passed = cpu[-1]
        accounted.append(
            sum(measured.busy.values()) / used * min(1, used / passed)
        )
    print(
        json.dumps([*map(np.median, (ratios, accounted)), str(measured)]),
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["three_to_one"]:
        three_to_one()
    else:
        absltest.main()
