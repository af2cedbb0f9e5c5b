"""What a worker process runs: receive a task, do it, answer, until its parent is done or gone.

Only the standard library is imported here; a task's own modules come in when it is unpacked.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from threading import Thread
from types import FrameType
from typing import Any, NamedTuple

from segfit.errors import StageError

__all__ = ["GRACE_S", "Answer", "main"]

GRACE_S = 3.0  # between being asked to end and being ended: time to remove unfinished files
_LOOK_S = 5.0  # between looks at who the parent is


class Answer(NamedTuple):
    """What a task came to."""

    value: Any = None
    error: Exception | None = None
    traceback: str = ""
    out_of_memory: bool = False


def main(descriptor: int) -> None:
    """Serve the connection with this descriptor until it closes; standard input closes when the parent is gone."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what bears on a case is in its result
    Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    try:
        while True:
            connection.send_bytes(_packed(_do(connection.recv_bytes())))
    except (EOFError, OSError):
        return


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)  # through all `finally`


def _end_with_parent() -> None:
    parent = os.getppid()
    # The parent's end of standard input closes with it, unless it was forked meanwhile: hence the second look.
    while os.getppid() == parent and not select.select([0], [], [], _LOOK_S)[0]:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def _do(payload: bytes) -> Answer:
    try:
        work, arguments, named = pickle.loads(payload)
    except Exception as error:  # noqa: BLE001 - whatever the imports of a task raise
        told = StageError(
            f"a worker cannot load its task ({error})",
            "the function must be defined in a module that can be imported, not in a script",
        )
        return Answer(error=told, traceback=traceback.format_exc())
    signal.signal(signal.SIGTERM, _leave)
    try:
        return Answer(work(*arguments, **named))
    except MemoryError:
        return Answer(traceback=traceback.format_exc(), out_of_memory=True)
    except Exception as error:  # noqa: BLE001 - goes back to who asked
        return Answer(error=error, traceback=traceback.format_exc())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # between tasks there is nothing to tidy up


def _packed(answer: Answer) -> bytes:
    try:
        packed = pickle.dumps(tuple(answer))
        pickle.loads(packed)  # errors may pack and not unpack
    except Exception as fault:  # noqa: BLE001 - whatever the classes of a result raise
        what = answer.value if answer.error is None else answer.error
        text = type(what).__name__ if answer.error is None else f"{type(what).__name__} ({what})"
        told = StageError(f"a task's {text} cannot be sent between processes ({fault})")
        return pickle.dumps(tuple(Answer(error=told, traceback=answer.traceback)))
    return packed
