"""Elapsed time without the stalls of a busy machine."""

from __future__ import annotations

import threading
import time
from types import TracebackType

TICK_S = 0.005
TICK_MAX_S = 0.02
"""The most that one tick can count. If the thread wakes up later, the process was stalled."""


class Stopwatch:
    """``with Stopwatch() as took: …``; then ``took.seconds`` is the elapsed time without stalls of this process.

    Waiting and sleeping count: a stall is only a time in which the stopwatch's own thread did not run.
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
