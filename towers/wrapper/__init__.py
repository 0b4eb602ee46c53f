"""wrapper: towers behind the face of a Keras model."""
