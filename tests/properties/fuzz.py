"""Tries the properties of the grammar, the readers and the image path on ever new examples, for so many minutes.

    python -m tests.properties.fuzz --minutes 10

Every example has a time limit. Code that does not come back to Python for longer (a decoder in C) ends the whole run
with the stack that it hangs in. The exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from tests.properties.hostile import FUZZ

SUBJECTS = ("grammar", "reader", "image", "scorer")
LIMIT = 20.0  # seconds an example; the longest that is not refused, a file of 178 megapixels, takes about five
STUCK = 3 * LIMIT
ROUND = 50  # examples of one property before the next has its turn


class TookTooLong(Exception):
    """An example ran into its time limit."""


def limited(check: Callable[..., None], count: Counter[str], name: str) -> Callable[..., None]:
    """The check of one example with a time limit, counted."""

    @wraps(check)
    def checked(*args: Any, **kwargs: Any) -> None:
        count[name] += 1
        late: list[str] = []

        def stop(*_: object) -> None:
            late.append(name)
            raise TookTooLong(f"{name}: an example took more than {LIMIT:g} seconds")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            check(*args, **kwargs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        if late:  # whoever takes every exception for a bad file has swallowed it
            raise TookTooLong(f"{name}: an example took more than {LIMIT:g} seconds")

    return checked


def properties(subjects: tuple[str, ...], count: Counter[str]) -> dict[str, Callable[[], None]]:
    """The properties of these subjects, by name, each with its time limit."""
    found: dict[str, Callable[[], None]] = {}
    for subject in subjects:
        module = importlib.import_module(f"tests.properties.test_{subject}_properties")
        for name, value in vars(module).items():
            if hasattr(value, "hypothesis"):
                value.hypothesis.inner_test = limited(value.hypothesis.inner_test, count, name)
                found[name] = value
    return found


def place(error: BaseException) -> str:
    """The kind of an error and where it was raised: equal for errors with one cause."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/hypothesis/" not in frame.filename and "/fuzz.py" not in frame.filename]
    at = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"


def fuzz(minutes: float) -> int:
    """Run; the number of different errors."""
    # Minimal examples would be nicer, but looking for them takes the time of looking for more.
    settings.register_profile(
        FUZZ,
        max_examples=ROUND,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    settings.load_profile(FUZZ)
    logging.getLogger("datamodules").setLevel(logging.ERROR)  # thousands of rows are left out, each with a warning
    count: Counter[str] = Counter()
    errors: dict[str, int] = {}
    checks = properties(SUBJECTS, count)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for name, check in checks.items():
            if time.monotonic() > end:
                break
            try:
                check()
            except Exception as error:
                where = f"{name}: {place(error)}"
                errors[where] = errors.get(where, 0) + 1
                if errors[where] == 1:
                    print(f"\n{where}", flush=True)
                    traceback.print_exc(limit=-8, file=sys.stdout)
                    print("\n".join(getattr(error, "__notes__", [])), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{sum(count.values()):,} examples of {len(checks)} properties, at most {peak:.1f} GiB of memory")
    print("\n".join(f"{number:>9,}  {name}" for name, number in sorted(count.items())))
    print("\n".join(["", f"{len(errors)} errors", *(f"{n:>4} times  {where}" for where, n in errors.items())]))
    return len(errors)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.properties.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    return int(fuzz(parser.parse_args().minutes) > 0)


if __name__ == "__main__":
    sys.exit(main())
