"""Every test sees four logical CPU devices, made before TensorFlow starts."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import towers  # noqa: E402

towers.Placement.cpus(4)
