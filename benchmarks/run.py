"""All ratios of `make bench`: a Markdown table on the terminal, and everything behind it in one JSON file.

    python -m benchmarks.run                            # all, about a quarter of an hour on two quiet cores
    python -m benchmarks.run --rows quickstart rollout  # some; --list names them

Every row is measured side by side within this run. Its two sides take turns, so that a load from outside meets both;
nevertheless, a machine that does nothing else tells more. What the rows mean stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.large import NEED_A_GPU
from benchmarks.table import Row, markdown

MODULES = ("step", "authors", "rollout", "learner", "quickstart", "large")  # of this package, each with its ROWS
LIBRARIES = ("torch", "transformers", "lightning", "trl", "timm", "numpy")


def known_rows() -> dict[str, Callable[[], Row]]:
    """Every row's name and what measures it, in the order of the table."""
    rows: dict[str, Callable[[], Row]] = {}
    for module in MODULES:
        rows |= importlib.import_module(f"benchmarks.{module}").ROWS
    return rows


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version_of(name) for name in LIBRARIES},
    }


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name, as Linux tells it; elsewhere what the platform knows."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(library: str) -> str | None:
    """The installed version, if there is one."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(rows: dict[str, Callable[[], Row]], file: Path) -> tuple[list[Row], dict[str, str]]:
    """Run rows one after another; what is measured so far is in ``file`` after each of them.

    Args:
        rows: by name.
        file: where the JSON goes.

    Returns:
        The rows, and of those that could not be measured the name and why.
    """
    done: list[Row] = []
    without = {} if torch.cuda.is_available() else NEED_A_GPU
    not_run = dict.fromkeys(without.values(), "no GPU")
    told: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": [],
    }

    def save() -> None:
        file.write_text(json.dumps({**told, "not_run": not_run}, indent=2) + "\n", encoding="utf-8")

    file.parent.mkdir(parents=True, exist_ok=True)
    save()
    for name, run in rows.items():
        if name in without:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        start, load = time.perf_counter(), os.getloadavg()[0]
        try:
            row = run()
        except Exception as error:  # the others are worth having
            traceback.print_exc()
            not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            done.append(row)
            took = {
                "took_s": round(time.perf_counter() - start, 1),
                "load": [round(load, 2), round(os.getloadavg()[0], 2)],
            }
            told["rows"].append({"id": name, **asdict(row), "met": row.met, **took})
        save()
    return done, not_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 if a row failed, not if one missed its target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="which, or the first word of several; all if not given"
    )
    parser.add_argument("--list", action="store_true", help="name the rows, and measure nothing")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch; all cores if not given"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/bench.json"), help="the JSON file")
    options = parser.parse_args(arguments)
    known = known_rows()
    if options.list:
        print("\n".join(known))
        return 0
    named = {name: [row for row in known if name in (row, row.split()[0])] for name in options.rows or ()}
    unknown = [name for name, rows in named.items() if not rows]
    if unknown:
        parser.error(f"Expected `--rows` to be some of {', '.join(known)}, but got {', '.join(unknown)}.")
    if options.threads < 1:
        parser.error(f"Expected `--threads` to be at least 1, but got {options.threads}.")
    torch.set_num_threads(options.threads)
    wanted = [row for rows in named.values() for row in rows] if options.rows else known
    chosen = {name: run for name, run in known.items() if name in wanted}
    done, not_run = measure(chosen, options.output)
    print(markdown(done, not_run))
    print(f"\n{options.output}: seconds, counts, versions, load")
    return 1 if any(name in known for name in not_run) else 0


if __name__ == "__main__":
    sys.exit(main())
