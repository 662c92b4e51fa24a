"""SIGTERM and Ctrl-C: a dispatch is finished and saved first, and a second Ctrl-C leaves at once.

A handler of Python's runs only when the interpreter does, which may be a minute away while a program is compiled, so a
thread listens as well. It says that the signal was heard, and ends the process when Ctrl-C is pressed again, which is
safe: whatever was being written is written whole or not at all.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from metagen_jax.processes import largest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A run was told to stop, and has saved what it had; its text says how to go on."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.code = 128 + number  # 143 for SIGTERM, 130 for Ctrl-C


class Stop:
    """Whether a run was told to stop."""

    def __init__(self, advice: str):
        self.advice = advice  # how to go on
        self.number: int | None = None  # of the first signal
        self._finishing = False
        self._leaving = False

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Let signals wait while the block runs, which is to call `told` and then `leave` where it can be left.

        Raises:
            Interrupted: at the end, if there was a signal.
        """
        self._finishing = True
        try:
            yield
            if self.told():
                self.leave()
        finally:
            self._finishing = False

    def told(self) -> bool:
        """Whether this process was told to stop, or another one of the run, each of which has to call this."""
        self.number = largest(self.number or 0) or None
        return self.number is not None

    def leave(self) -> None:
        """Leave for the signal that there was.

        Raises:
            Interrupted: always.
        """
        self._leaving = True
        number = self.number or signal.SIGTERM
        raise Interrupted(
            number, f"stopped by {signal.Signals(number).name}" + (f"; {self.advice}" if self.advice else "")
        )

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, and leave by an exception unless that is done or something is to be finished."""
        self.number = self.number or number
        if not (self._finishing or self._leaving):
            self.leave()

    def hear(self, listen: socket.socket) -> None:
        """Read signals as they arrive, whatever the main thread does, until the other end is closed."""
        heard = 0
        while received := listen.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if heard and number == signal.SIGINT:
                print(f"metagen: left at once; {self.advice}", file=sys.stderr, flush=True)
                os._exit(128 + number)
            heard += 1
            if heard == 1 and self._finishing:
                print("metagen: finishing the dispatch, and saving; Ctrl-C leaves at once", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable(advice: str) -> Iterator[Stop]:
    """Catch SIGTERM and Ctrl-C while the block runs; outside the main thread, which alone may, catch nothing.

    Args:
        advice: how to go on, a part of a sentence.
    """
    stop = Stop(advice)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    listen, tell = socket.socketpair()
    tell.setblocking(False)
    thread = threading.Thread(target=stop.hear, args=(listen,), daemon=True)
    thread.start()
    before: dict[signal.Signals, Any] = {}
    wakeup = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    try:
        for number in SIGNALS:
            before[number] = signal.signal(number, stop.handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        tell.close()
        thread.join()
        listen.close()
