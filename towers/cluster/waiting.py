"""waiting: what may have no end, left alone when a worker is lost."""

import threading
from collections.abc import Callable
from concurrent import futures

_OFTEN = 0.05  # seconds between two looks at who is lost


def ended_before(call: Callable[[], None], is_lost: Callable[[], bool]) -> bool:
    """Whether `call()` ends before a worker is lost; else it is left to itself.

    It runs in a thread that does not keep the program alive. Its error is raised,
    unless it is due to the loss.
    """
    if is_lost():
        return False
    told: futures.Future[None] = futures.Future()

    def run() -> None:
        try:
            call()
            told.set_result(None)
        except BaseException as error:
            told.set_exception(error)

    threading.Thread(target=run, name="waiting", daemon=True).start()
    while not is_lost():
        futures.wait([told], _OFTEN)
        if told.done() and not is_lost():
            told.result()
            return True
    return False
