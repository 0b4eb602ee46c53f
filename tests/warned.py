"""warned: what a call warns of, each time that it does."""

import warnings
from collections.abc import Callable
from typing import Any


def messages(call: Callable[[], Any], words: str = "") -> list[str]:
    """Those of the warnings of a call that have these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if words in text]
