"""A worker process for workers_test: `worker.py CLUSTER_JSON INDEX`."""

import json
import sys

import tensorflow as tf

cluster = tf.train.ClusterSpec(json.loads(sys.argv[1]))
tf.distribute.Server(
    cluster, job_name="worker", task_index=int(sys.argv[2]), protocol="grpc"
).join()
