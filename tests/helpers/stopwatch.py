"""Elapsed time of which the stalls of a busy machine are no part."""

from __future__ import annotations

import threading
import time
from types import TracebackType

TICK_S = 0.005
TICK_MAX_S = 0.02
"""What counts of a tick: whoever wakes later than that was not let run."""


class Stopwatch:
    """``with Stopwatch() as took: …``; then ``took.seconds`` are those in which this process was let run.

    A process that waits for the network or sleeps is let run, as far as this can tell: only what keeps its other
    thread from waking does not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        before_s = time.monotonic()
        ended = False
        while not ended:
            ended = self._ended.wait(TICK_S)
            now_s = time.monotonic()
            self.seconds += min(now_s - before_s, TICK_MAX_S)
            before_s = now_s
