"""Ctrl-C and SIGTERM: stop within seconds, leave nothing half written, end with 130 or 143."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from redpass import artifact

GRACE = 2.5
"""Seconds that orderly unwinding may take; then the process ends as it is, files cleaned up."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised in the main thread by the first SIGINT or SIGTERM."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by signal {number}")

    @property
    def exit_code(self) -> int:
        """What shells report for a process that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Lets signals end the block by `Stopped`, or the process when the block does not end.

    A handler of Python runs only between two steps of the interpreter, and one call into native
    code can last minutes; a thread that waits beside it holds the deadline.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _raise) for number in SIGNALS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=_watch, args=(reader, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # ends the thread


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def _watch(reader: socket.socket, done: threading.Event) -> None:
    with reader:
        while received := reader.recv(1):
            number = received[0]
            if number in SIGNALS and not done.wait(GRACE):
                artifact.abandon_all()
                os.write(2, b"redpass: stopped in the middle of native code; nothing was written\n")
                os._exit(128 + number)
