"""cluster: towers in other processes, on other machines, on TensorFlow's runtime.

TensorFlow carries all tensors. What it lacks is here: a worker in one command,
connecting that ends, and knowing by a heartbeat when a worker is lost.
"""
