"""long_waits: who waits for longer than a few seconds is told for what.

On stderr, where a person sees it and no program reads it; or in absl's log, where
Keras is told to log and not to print.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import keras
from absl import logging

SECONDS = 5.0  # until the first line; until each further one twice as many


@contextlib.contextmanager
def announced(what: str | Callable[[], str]) -> Iterator[None]:
    """While open, says what is being done, if that takes long.

    Args:
      what: in words, "building 8 towers"; or what finds them, in a thread.
    """
    prints = keras.config.is_interactive_logging_enabled()  # of this thread
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = SECONDS
        while not ended.wait(pause):
            words = what if isinstance(what, str) else what()
            seconds = time.monotonic() - began
            say(f"{words} ({seconds:.0f} s so far)", prints)
            pause *= 2

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def say(words: str, prints: bool | None = None) -> None:
    """Says it now: printed or logged, by default as Keras does in this thread."""
    if prints is None:
        prints = keras.config.is_interactive_logging_enabled()
    if prints:
        print(f"towers: {words}", file=sys.stderr, flush=True)
    else:
        logging.info("towers: %s", words)
