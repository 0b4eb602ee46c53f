"""A chief that connects, loses workers, and watches them: run by cluster_test."""

import collections
import contextlib
import http.server
import io
import socket
import tempfile
import threading
import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import absltest
from cluster_workers import Workers, free_ports, wait_until
from sent_bytes import of_a_step

import towers

WORKERS = Workers(4, started=2)
SOON = 30  # seconds; without a heartbeat, or a timeout, it would be never
BEFORE = tf.Variable(3.0)  # starts TensorFlow, after the fork


def close(found, expected):
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found,
        expected,
    )


def http_server(port):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), http.server.SimpleHTTPRequestHandler
    )
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def without(name):
    """While open, a name does not resolve, whatever nameservers do and how long."""
    original = socket.getaddrinfo

    def found(host, *args, **kwargs):
        if host == name:
            raise socket.gaierror(
                socket.EAI_NONAME, "Name or service not known"
            )
        return original(host, *args, **kwargs)

    with mock.patch.object(socket, "getaddrinfo", found):
        yield


def taught(model):
    """What a model's methods give, each of which waits for all processes."""
    x, y = np.ones([5, 4], "float32"), np.ones([5, 1], "float32")
    model.compile("sgd", "mse")
    history = model.fit(x, y, batch_size=3, verbose=0, shuffle=False).history
    loss = model.evaluate(x, y, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        tf.train.Checkpoint(v=tf.Variable(1.0)).save(f"{folder}/v")
    return history["loss"], loss, model.predict(x, verbose=0).tolist()


def network():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(1, name="one")]
    )


def step_on(devices):
    @tf.function
    def step(x):
        for device in devices:
            with tf.device(device):
                x = tf.matmul(x, x)
        return tf.reduce_sum(x)

    return step


PLAIN = taught(network())


class ConnectingTest(absltest.TestCase):
    def refused(self, address, pattern):
        start = time.monotonic()
        with self.assertRaisesRegex(TimeoutError, pattern):
            towers.Cluster([WORKERS.addresses[0], address], timeout=2)
        self.assertLess(time.monotonic() - start, SOON)

    def test_1_who_does_not_answer_is_named_in_time(self):
        towers.Cluster(WORKERS.addresses[:1])  # it is there
        (port,) = free_ports(1)
        self.refused(f"127.0.0.1:{port}", rf"127.0.0.1:{port} .*refused")
        with (
            contextlib.redirect_stderr(io.StringIO()) as said,
            without("no.such.invalid"),
        ):
            self.refused("no.such.invalid:2222", "such.invalid:2222 .*resolve")
        line = r"worker no.such.invalid:2222 does not resolve; trying for \d s"
        self.assertRegex(said.getvalue(), line)
        servers = [http_server(port), http_server(port + 1000)]
        self.refused(f"127.0.0.1:{port}", f"{port} .*heartbeat: something else")
        heartbeat = int(WORKERS.addresses[1].split(":")[1]) + 1000
        mixed = f"127.0.0.1:{port}:{heartbeat}"
        self.refused(mixed, f"{mixed} .*else than TensorFlow")
        for server in servers:
            server.shutdown()
            server.server_close()

    def test_2_who_comes_late_is_waited_for(self):
        start = time.monotonic()
        threading.Timer(10, WORKERS.start, [2]).start()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            cluster = towers.Cluster(WORKERS.addresses[:3], timeout=50)
        self.assertGreater(time.monotonic() - start, 9.5)
        late = rf"waiting for \d of 3 workers: .*{WORKERS.addresses[2]} \(heart"
        self.assertRegex(said.getvalue(), late)
        self.assertLen(cluster.devices("CPU"), 3)
        self.assertEmpty(cluster.devices("GPU"))
        self.assertEqual(cluster.alive(), WORKERS.addresses[:3])
        self.assertEqual(float(BEFORE), 3.0)

    def test_3_names_mean_this_process_unless_they_say_more(self):
        cluster = towers.Cluster(WORKERS.addresses[:3])
        placement = towers.Placement.workers(cluster)
        self.assertEqual(list(placement.devices), cluster.devices())
        ours = "/job:localhost/replica:0/task:0/device:CPU:0"
        self.assertEqual(placement.parameter_device, ours)
        self.assertEqual(towers.Placement.cpus(1).devices, (ours,))
        with self.assertRaisesRegex(RuntimeError, "already started with 1"):
            towers.Placement.cpus(2)
        with self.assertRaisesRegex(ValueError, "all GPUs.*sees none"):
            towers.Placement.gpus()
        with self.assertRaisesRegex(ValueError, "task:0.*task:1.*task:2"):
            towers.Placement(["/job:worker/CPU:0"])
        with self.assertRaisesRegex(ValueError, "only .*task:2/device:CPU:0"):
            towers.Placement(["/job:worker/task:7/CPU:0"])
        with self.assertRaisesRegex(ValueError, "`kind` is 'GPU'.*CPU:0"):
            towers.Placement.workers(cluster, "GPU")

    def test_4_one_that_stops_is_lost_and_can_come_back(self):
        cluster = towers.Cluster(WORKERS.addresses[:3], heartbeat=3)
        devices = cluster.devices()
        step = step_on(devices)
        x = tf.eye(8)
        with cluster.watch():
            self.assertEqual(float(step(x)), 8)
        with tf.device(devices[1]):
            there = tf.function(tf.reduce_sum)(x)
        WORKERS.stop(1)
        start = time.monotonic()
        with self.assertRaises(towers.WorkerLost) as caught, cluster.watch():
            there.numpy()  # Python is not locked, so the heartbeat is heard
        self.assertLess(time.monotonic() - start, SOON)
        self.assertEqual(caught.exception.workers, (WORKERS.addresses[1],))
        self.assertNotIn(WORKERS.addresses[1], cluster.alive())
        with self.assertRaises(towers.WorkerLost), cluster.watch():
            step(x)  # at once, and without asking TensorFlow
        # What is on this process goes on, before `update`, in the same seconds.
        here = ["/job:localhost/task:0/CPU:0"] * 2
        model = towers.TowerModel(network(), towers.Placement(here))
        close(taught(model), PLAIN)
        close(taught(network()), PLAIN)
        read = towers.per_tower(lambda _: tf.data.Dataset.range(4).batch(2))
        self.assertLen(list(read.batches(towers.Placement(here))), 2)
        self.assertTrue(cluster.update())
        self.assertEqual(cluster.devices(), [devices[0], devices[2]])
        with cluster.watch():
            self.assertEqual(float(step_on(cluster.devices())(x)), 8)
        self.assertFalse(cluster.update())
        WORKERS.resume(1)
        wait_until(lambda: len(cluster.alive()) == 3)
        self.assertTrue(cluster.update())
        with cluster.watch():
            self.assertEqual(float(step(x)), 8)

    def test_5_one_that_dies_is_lost_and_can_be_started_again(self):
        cluster = towers.Cluster(WORKERS.addresses[:3])
        step = step_on(cluster.devices())
        x = tf.eye(8)
        with cluster.watch():
            step(x)
        WORKERS.kill(2)
        close(taught(network()), PLAIN)  # nobody has noticed yet
        with self.assertRaises(towers.WorkerLost) as caught, cluster.watch():
            step(x)
        self.assertEqual(caught.exception.workers, (WORKERS.addresses[2],))
        self.assertTrue(cluster.update())
        self.assertLen(cluster.devices(), 2)
        WORKERS.start(2)
        wait_until(lambda: len(cluster.alive()) == 3)
        self.assertTrue(cluster.update())
        with cluster.watch():
            self.assertEqual(float(step(x)), 8)
        with self.assertRaisesRegex(ValueError, "mine"), cluster.watch():
            raise ValueError("mine")  # no worker is lost

    def test_6_another_cluster_takes_the_place_in_any_order(self):
        addresses = [WORKERS.addresses[2], WORKERS.addresses[0]]
        cluster = towers.Cluster(addresses)
        self.assertLen(cluster.devices(), 2)
        with cluster.watch():
            self.assertEqual(float(step_on(cluster.devices())(tf.eye(8))), 8)
        self.assertEqual(float(BEFORE), 3.0)

    def test_7_workers_tell_what_they_ran_and_when(self):
        cluster = towers.Cluster([WORKERS.addresses[i] for i in (2, 0)])
        model = towers.TowerModel(
            keras.Sequential([keras.Input([8]), keras.layers.Dense(4)]),
            towers.Placement.workers(cluster),
        )
        model.compile("sgd", "mse")
        step = model.train_on_batch, np.ones([6, 8]), np.ones([6, 4])
        before = time.perf_counter()
        found = towers.timeline(*step)
        passed = time.perf_counter() - before
        self.assertEqual(found.unseen, ())
        self.assertLen(found.towers, 2)
        for i, device in enumerate(cluster.devices()):
            self.assertGreater(found.busy[device], 0)
            ops = [o for o in found.ops if o.device == device]
            self.assertIn(f"tower_{i}/dense/BiasAdd", [o.name for o in ops])
            for op in ops:
                self.assertBetween(op.start, 0, passed)
        report = towers.execution_report(*step)
        self.assertEqual(
            collections.Counter((c.source, c.target) for c in found.crossings),
            collections.Counter((t.source, t.target) for t in report.transfers),
        )
        for crossing in found.crossings:
            self.assertIsNotNone(crossing.sent)
            took = crossing.arrived - crossing.sent
            self.assertBetween(took, -1e-4, passed)
        with mock.patch.object(cluster, "pulses", return_value={}):
            found = towers.timeline(*step)
        self.assertCountEqual(found.unseen, cluster.devices())
        self.assertEmpty(set(cluster.devices()) & set(found.busy))
        self.assertIn(f"not seen  {found.unseen[0]}", str(found))

    def test_8_bytes_of_loops_are_those_that_all_processes_send(self):
        cluster = towers.Cluster([WORKERS.addresses[i] for i in (2, 0)])
        there = cluster.devices()
        here = "/job:localhost/replica:0/task:0/device:CPU:0"
        for one, other in ((here, there[0]), tuple(there)):

            @tf.function
            def loop(x, n, one=one, other=other):
                def step(i, x):
                    with tf.device(other):
                        y = tf.nn.relu(x)
                    with tf.device(one):
                        return i + 1, y + 1.0

                with tf.device(one):
                    x = tf.identity(x)
                return tf.reduce_sum(
                    tf.while_loop(lambda i, _: i < n, step, [0, x])[1]
                )

            x, n = tf.ones([128, 512]), tf.constant(50)

            def run(loop=loop, x=x, n=n):
                return float(loop(x, n))

            sent = of_a_step(run, [WORKERS.pids[k] for k in (2, 0)], 1)
            report = towers.execution_report(loop, x, n, loops=True)
            self.assertEmpty(report.unknown)
            self.assertGreater(report.total_bytes, 2 * 50 * 128 * 512 * 4)
            self.assertBetween(sent / report.total_bytes, 1.0, 1.04)

    def test_9_a_first_fit_is_told_whole(self):
        cluster = towers.Cluster([WORKERS.addresses[i] for i in (2, 0)])
        there = cluster.devices()
        model = towers.TowerModel(
            keras.Sequential([keras.Input([8]), keras.layers.Dense(4)]),
            towers.Placement(there, parameter_device=there[0]),
        )
        model.compile("adam", "mse", metrics=["mae"])
        x, y = np.ones([6, 8]), np.ones([6, 4])
        first, second = (
            towers.execution_report(lambda: model.fit(x, y, verbose=0))
            for _ in "ab"
        )
        self.assertEqual(first.bytes_between, second.bytes_between)
        # The worker alone made the values of metrics, and in the first only.
        more = {device for device, _ in first.ops - second.ops}
        self.assertEqual(more, {there[0]})

    def test_9_inputs_that_have_ended_begin_anew_when_they_are_asked_to(self):
        cluster = towers.Cluster([WORKERS.addresses[i] for i in (2, 0)])
        data = towers.per_tower(
            lambda tower: tf.data.Dataset.range(9 - tower.index).batch(2)
        )
        where = towers.Placement.workers(cluster)
        model = keras.Sequential([keras.Input([]), keras.layers.Identity()])

        def total(_, shard):
            return tf.reduce_sum(shard)[tf.newaxis]

        @tf.function
        def three():
            sums = tf.zeros([2], tf.int64)
            for _ in tf.range(3):
                sums += towers.build_towers(
                    model, data, where, tower_fn=total
                ).outputs
            return sums

        for _ in range(6):
            self.assertEqual(three().numpy().tolist(), [15, 15])
            with self.assertRaises(tf.errors.OutOfRangeError):
                three()
            data.restart()


if __name__ == "__main__":
    absltest.main()
