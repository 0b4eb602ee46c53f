"""keras_model: a Keras model as a pure function of its variables and inputs."""
