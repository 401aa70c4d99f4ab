"""SIGINT and SIGTERM: save the work before the process ends, and say whether the same command continues."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

CONTINUE = "run the same command again to continue"


@contextmanager
def resumable() -> Iterator[None]:
    """Turn SIGTERM, which schedulers send before they kill a job, into SystemExit: the block can write finished work.

    For a command that continues when it is repeated: the message of this SystemExit, or of a KeyboardInterrupt, says so.
    """

    def exit_process(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # as shells report it

    handlers = _set_handlers(exit_process, signal.SIGTERM)
    try:
        yield
    except SystemExit:
        print(f"terminated; {CONTINUE}", file=sys.stderr)
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(CONTINUE) from error
    finally:
        _restore_handlers(handlers)


class Interruption:
    """Turn the first SIGINT or SIGTERM in the block into a request to stop. A second one acts as it would without the block.

    The message is shown when the first one arrives.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.signal_number = 0  # of the first signal, once it has arrived
        self._handlers: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Return True if a signal arrived."""
        return self.signal_number != 0

    def __enter__(self) -> Interruption:
        self._handlers = _set_handlers(self._request, signal.SIGINT, signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _restore_handlers(self._handlers)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        _restore_handlers(self._handlers)
        tqdm.write(self.message, file=sys.stderr)


def _set_handlers(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> dict[signal.Signals, Any]:
    """Handle signals. Return the previous handlers, or nothing outside the main thread, which alone may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _restore_handlers(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
