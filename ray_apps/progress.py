"""What remote workers tell in a run's folder, as lines in the driver's log; Ray itself forwards no output here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lake.progress import read_progress

log = logging.getLogger(__name__)

EVERY_SEC = 5.0


@contextmanager
def following(run_folder: str) -> Iterator[None]:
    """Logs how far the run is every few seconds, where there is news, while the block runs."""
    stop, before = threading.Event(), read_progress(run_folder)

    def follow() -> None:
        shown = before
        while not stop.wait(EVERY_SEC):
            state = read_progress(run_folder)
            if state is not None and state != shown:
                log.info("%d of %d: %s", *state)
                shown = state

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
