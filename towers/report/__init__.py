"""report: what TensorFlow really ran, where, and what crossed between devices."""
