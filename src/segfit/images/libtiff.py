"""What libtiff says of damaged pixels: Pillow decodes with it, passes on few of its errors and lets it print all.

So fax and JPEG that are damaged would come out as pixels that nobody drew, with a line on stderr that names no file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

__all__ = ["errors"]

_ONE = Lock()  # the handler is one for all threads
_LONGEST = 300  # bytes of a message
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list


@contextmanager
def errors() -> Iterator[list[str]]:
    """Collect what libtiff says while Pillow decodes; always nothing where it cannot be asked."""
    heard: list[str] = []
    functions = _functions()
    if functions is None:
        yield heard
        return
    set_handler, print_into = functions

    def hear(_: bytes | None, form: bytes, values: int) -> None:
        text = ctypes.create_string_buffer(_LONGEST)
        print_into(text, _LONGEST, form, values)
        heard.append(text.value.decode("utf-8", "replace"))

    handler = _HANDLER(hear)
    with _ONE:
        before = set_handler(ctypes.cast(handler, ctypes.c_void_p))
        try:
            yield heard
        finally:
            set_handler(before)


@cache
def _functions() -> tuple[Any, Any] | None:
    """Return ``TIFFSetErrorHandler`` of the libtiff that Pillow uses, and ``vsnprintf``."""
    from PIL import _imaging

    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler  # looked up in what it is linked with, too
        print_into = ctypes.CDLL(None).vsnprintf
    except (OSError, AttributeError, TypeError):  # linked another way, or Windows
        return None
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    print_into.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
    return set_handler, print_into
