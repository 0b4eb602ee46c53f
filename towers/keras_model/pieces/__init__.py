"""pieces: layers that are cut: what of them, and how they are computed."""
