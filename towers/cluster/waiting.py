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
    outcome: futures.Future[None] = futures.Future()

    def run() -> None:
        try:
            call()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="waiting", daemon=True).start()
    while not is_lost():
        futures.wait([outcome], _OFTEN)
        if outcome.done() and not is_lost():
            outcome.result()
            return True
    return False
