"""progress: a sign of life where building towers takes long."""

import time

from absl import logging

SECONDS = 3.0  # between two signs


class Progress:
    """Tells, by absl's log, how far building has come."""

    def __init__(self, towers: int):
        self._towers = towers
        self._told = time.monotonic()

    def tell(self, built: int, copied: int) -> None:
        """To be called for each tower; says something every few seconds."""
        now = time.monotonic()
        if now - self._told >= SECONDS:
            self._told = now
            logging.info(
                "Towers: %d of %d are built, %d of them as copies of another.",
                built,
                self._towers,
                copied,
            )
