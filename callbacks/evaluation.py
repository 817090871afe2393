"""A test's results beside its predictions: JSON, a table, curves, and what the benchmarks' own tools take."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from modules.evaluation.results import gather, official, read_run, results, scalars, table


class Evaluation(L.Callback):
    """At the end of a test, scores what is in ``predictions.jsonl``.

    Leaves in the run's folder ``results.json``, ``results.md``, and below ``official/<data set>/<evaluation>/`` the
    files that the benchmark's own repository or server takes; curves go to the loggers as ``results/…``. They depend on
    the predictions alone, so that an interrupted test that was gone on with has the same.
    """

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the results, on the first rank, once all ranks have answered."""
        trainer.strategy.barrier("results")
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        answers = gather(read_run(folder))
        found = results(answers)
        write(folder / "results.json", json.dumps(found, indent=2) + "\n")
        write(folder / "results.md", table(found))
        for name, text in official(answers).items():
            write(folder / "official" / name, text)
        for logger in trainer.loggers:
            logger.log_metrics(scalars(found), 0)
        print(f"\n{table(found)}\nwritten to {folder / 'results.json'}", flush=True)


def write(path: Path, text: str) -> None:
    """Write a file that is either there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)
