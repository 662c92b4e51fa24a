"""Progress on a terminal as a bar, elsewhere as a line every few seconds, with an honest phase for compiling.

Nothing can be counted before the first dispatch returns, and that one compiles: until then the time alone is shown.
"""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Progress of one loop, as a context manager.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> with Progress("training", 20, unit="meta-step", tasks=4, file=out) as progress:
        ...     progress.update(10, loss=120.5)
        ...     progress.update(20, loss=110.5)
        >>> out.getvalue().splitlines()[0]
        'training: compiling ...'
    """

    def __init__(self, title: str, total: int, *, unit: str, tasks: int | None = None, file: TextIO | None = None):
        """Describe the loop.

        Args:
            title: what is done.
            total: units in all.
            unit: what is counted.
            tasks: of one unit, to show tasks a second.
            file: where to; standard error if None.
        """
        self.title, self.total, self.unit, self.tasks = title, total, unit, tasks
        self.file = sys.stderr if file is None else file
        self.compile_seconds: float | None = None  # until the first dispatch returned
        self._is_terminal = self.file.isatty()
        self._bar: tqdm | None = None
        self._done, self._first_done = 0, 0
        self._compiled = threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._begin = self._first = self._last_line = time.perf_counter()
        if self._is_terminal:
            self._clock = threading.Thread(target=self._show_clock, daemon=True)
            self._clock.start()
        else:
            self._line(f"{self.title}: compiling ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_clock()
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, loss: float | None = None) -> None:
        """Show that `done` units are done in all, after a dispatch."""
        now = time.perf_counter()
        if self.compile_seconds is None:
            self.compile_seconds, self._first, self._first_done = now - self._begin, now, done
            self._stop_clock()
            note = f"{self.title}: compiled, with the first {done} {self.unit}s, in {self.compile_seconds:.1f} s"
            self._line(note)
            if self._is_terminal:
                self._bar = tqdm(total=self.total, initial=done, unit=self.unit, desc=self.title, file=self.file)
        self._done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(self._rates(now, loss, with_units=False), refresh=True)
        elif done >= self.total or now - self._last_line >= LINE_EVERY:
            self._line(f"{self.title}: {done}/{self.total} {self.unit}s{self._rates(now, loss, with_units=True)}")

    def note(self, text: str) -> None:
        """Show a line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(f"{self.title}: {text}", file=self.file)
        else:
            self._line(f"{self.title}: {text}")

    def _rates(self, now: float, loss: float | None, *, with_units: bool) -> str:
        parts = []
        if self._done > self._first_done and now > self._first:
            rate = (self._done - self._first_done) / (now - self._first)
            if with_units:
                parts.append(f"{rate:.1f} {self.unit}s/s")
            if self.tasks is not None:
                parts.append(f"{rate * self.tasks:.0f} tasks/s")
            if with_units and self._done < self.total:
                parts.append(f"{(self.total - self._done) / rate:.0f} s left")
        if loss is not None:
            parts.append(f"loss {loss:.2f}")
        return "".join(f", {part}" for part in parts) if with_units else ", ".join(parts)

    def _line(self, text: str) -> None:
        self._last_line = time.perf_counter()
        print(text, file=self.file, flush=True)

    def _show_clock(self) -> None:
        while not self._compiled.wait(0.2):
            seconds = time.perf_counter() - self._begin
            print(f"\r{self.title}: compiling ... {seconds:.0f} s", end="", file=self.file, flush=True)
        print("\r\033[K", end="", file=self.file, flush=True)

    def _stop_clock(self) -> None:
        self._compiled.set()
        if self._clock is not None:
            self._clock.join()
            self._clock = None
