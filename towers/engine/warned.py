"""warned: what each tower is warned of is said once."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from towers.foreign.patches import patched


@contextlib.contextmanager
def once() -> Iterator[None]:
    """While open, a warning that was shown before is not shown again."""
    show, keys = warnings.showwarning, set[tuple[Any, ...]]()

    def shown(
        message: Any,
        category: Any,
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        key = (str(message), category, filename, lineno)
        if key not in keys:
            keys.add(key)
            show(message, category, filename, lineno, file, line)

    with patched((warnings, "showwarning", shown)):
        yield
