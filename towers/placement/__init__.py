"""placement: where everything runs, and how devices are called."""
