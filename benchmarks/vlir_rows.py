"""How long it takes to read and check VLIR rows, and how much memory, as JSON lines and as parquet.

    python -m benchmarks.vlir_rows --rows 100000

Each form is read in a process of its own, on two cores at most. Rows have a rationale of three steps with two regions,
about 1.3 kB each. Prints one JSON object; memory is the peak of the process's resident set, everything imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT = "the sign on its left is small so I zoom in to read label and count what stands beside it before answering"
CORES = 2
MIB = 1024  # kibibytes


def make_rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of the form's every key."""
    chance, words = random.Random(0), TEXT.split()

    def phrase(count: int) -> str:
        return " ".join(chance.choices(words, k=count))

    for k in range(count):
        steps: list[dict[str, Any]] = []
        for _ in range(2):
            box = [chance.uniform(0, 100), 5.5, chance.uniform(200, 300), 300.25]
            steps.append({"text": f"<think>{phrase(40)}", "region": {"box": box, "image": 0, "why": phrase(8)}})
        yield {
            "id": f"row-{k}",
            "image": f"images/{k % 20_000:06d}.jpg",
            "question": f"{phrase(14)}?",
            "answers": ["7", "seven"],
            "source": "textvqa",
            "choices": ["6", "7", "8"],
            "answer_kind": "vqa",
            "regions": [{"box": [1, 2, 30, 40], "image": 0}],
            "rationale": [*steps, {"text": f"{phrase(30)}</think><answer>7</answer>"}],
            "meta": {"image_id": str(k % 20_000)},
            "provenance": {"dataset": "textvqa", "row": k, "writer": "a-model"},
        }


def write(folder: Path, rows: int) -> dict[str, Path]:
    """The same rows in both forms; the form's name -> the file."""
    from datamodules.vlir.parquet import write_parquet

    lines, columns = folder / "rows.jsonl", folder / "rows.parquet"
    with lines.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(rows))
    write_parquet(columns, make_rows(rows))
    return {"jsonl": lines, "parquet": columns}


def measure(path: Path, cache: str) -> dict[str, float]:
    """Read a file; to be called in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))
    os.environ["HF_DATASETS_CACHE"] = cache  # empty: what is measured includes the conversion of parquet
    from datamodules.vlir.reader import read_records

    imported = _peak()
    begun = time.perf_counter()
    records, bad = read_records(path)
    seconds = time.perf_counter() - begun
    peak = _peak()
    begun = time.perf_counter()
    picked = random.Random(1).sample(range(len(records)), min(1000, len(records)))
    ids = {records[k].sample.id for k in picked}
    return {
        "rows": len(records),
        "bad": len(bad),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(records) / seconds),
        "peak_mib": round(peak),
        "of_it_imports_mib": round(imported),
        "random_row_microseconds": round((time.perf_counter() - begun) / len(ids) * 1e6, 1),
        "file_mib": round(path.stat().st_size / MIB**2, 1),
    }


def _peak() -> float:
    """Mebibytes, of this process alone: what `getrusage` says of a child begins with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / MIB
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / (MIB**2 if sys.platform == "darwin" else MIB)


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for form, path in write(Path(folder), rows).items():
            with context.Pool(1) as pool:
                results[form] = pool.apply(measure, (path, f"{folder}/cache"))
        print(json.dumps({"cores": CORES, **results}, indent=2))


if __name__ == "__main__":
    main()
