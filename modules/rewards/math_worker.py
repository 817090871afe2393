"""Compares mathematical expressions, a JSON line in and a JSON line out; started by `modules.rewards.mathematics`.

A process of its own, for computer algebra may take for ever or all memory, and math-verify's own timeouts are
signals, which exist in main threads only. Nothing of this project is imported, so that it starts soon.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

MEMORY = 4 * 2**30  # bytes of address space


def delimited(text: str) -> str:
    """An answer is an expression from end to end, unless it says where one stands in it."""
    return text if any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) else f"${text}$"


def equal(prediction: str, answer: str) -> bool:
    """Whether math-verify holds two expressions for equal."""
    from math_verify import parse, verify

    gold, said = (parse(delimited(text), parsing_timeout=None) for text in (answer, prediction))
    return bool(verify(gold, said, timeout_seconds=None))


def limit_memory() -> None:
    """Have the system refuse what would not fit; there is no such limit on Windows."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> None:
    """Answer until the input ends. What cannot be compared is not equal."""
    limit_memory()
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # some clusters send a job's signals to children too
    logging.disable(logging.CRITICAL)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    equal("1", "1")  # what is loaded at the first use, before anybody waits
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            verdict = equal(*json.loads(line))
        except Exception:
            verdict = False
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
