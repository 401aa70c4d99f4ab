"""Delay an interruption to a point where the work can be saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Turn the first SIGINT or SIGTERM in the block into a request to stop. A second one acts as it would without the block.

    The message is shown when the first one arrives.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.signal_number = 0  # of the first signal, once it has arrived
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Return True if a signal arrived."""
        return self.signal_number != 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        tqdm.write(self.message, file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
