"""A chief that connects, and loses workers: run by cluster_test."""

import http.server
import threading
import time

import tensorflow as tf
from absl.testing import absltest
from cluster_workers import Workers, free_ports, wait_until

import towers

WORKERS = Workers(4, started=2)
BEFORE = tf.Variable(3.0)  # starts TensorFlow, after the fork


def http_server(port):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), http.server.SimpleHTTPRequestHandler
    )
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def step_on(devices):
    @tf.function
    def step(x):
        for device in devices:
            with tf.device(device):
                x = tf.matmul(x, x)
        return tf.reduce_sum(x)

    return step


class ConnectingTest(absltest.TestCase):
    def refused(self, address, pattern):
        start = time.monotonic()
        with self.assertRaisesRegex(TimeoutError, pattern):
            towers.Cluster([WORKERS.addresses[0], address], timeout=1)
        self.assertLess(time.monotonic() - start, 5)

    def test_1_who_does_not_answer_is_named_in_time(self):
        towers.Cluster(WORKERS.addresses[:1])  # it is there
        (port,) = free_ports(1)
        self.refused(f"127.0.0.1:{port}", rf"127.0.0.1:{port} .*refused")
        self.refused("no.such.invalid:2222", "no.such.invalid:2222 .*resolve")
        servers = [http_server(port), http_server(port + 1000)]
        self.refused(f"127.0.0.1:{port}", f"{port} .*heartbeat: something else")
        heartbeat = int(WORKERS.addresses[1].split(":")[1]) + 1000
        mixed = f"127.0.0.1:{port}:{heartbeat}"
        self.refused(mixed, f"{mixed} .*else than TensorFlow")
        for server in servers:
            server.shutdown()
            server.server_close()

    def test_2_who_comes_late_is_waited_for(self):
        threading.Timer(2, WORKERS.start, [2]).start()
        start = time.monotonic()
        cluster = towers.Cluster(WORKERS.addresses[:3], timeout=50)
        self.assertGreater(time.monotonic() - start, 1.5)
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
        with self.assertRaisesRegex(ValueError, "all GPUs.*sees 0"):
            towers.Placement.gpus()
        with self.assertRaisesRegex(ValueError, "task:0.*task:1.*task:2"):
            towers.Placement(["/job:worker/CPU:0"])
        with self.assertRaisesRegex(ValueError, "only .*task:2/device:CPU:0"):
            towers.Placement(["/job:worker/task:7/CPU:0"])
        with self.assertRaisesRegex(ValueError, "`kind` is 'GPU'.*CPU:0"):
            towers.Placement.workers(cluster, "GPU")

    def test_4_one_that_stops_is_lost_and_can_come_back(self):
        cluster = towers.Cluster(WORKERS.addresses[:3], heartbeat=1)
        devices = cluster.devices()
        step = step_on(devices)
        x = tf.eye(8)
        with cluster.watch():
            self.assertEqual(float(step(x)), 8)
        WORKERS.stop(1)
        start = time.monotonic()
        with self.assertRaises(towers.WorkerLost) as caught, cluster.watch():
            step(x)
        self.assertLess(time.monotonic() - start, 3)
        self.assertEqual(caught.exception.workers, (WORKERS.addresses[1],))
        self.assertNotIn(WORKERS.addresses[1], cluster.alive())
        with self.assertRaises(towers.WorkerLost), cluster.watch():
            step(x)  # at once, and without asking TensorFlow
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


if __name__ == "__main__":
    absltest.main()
