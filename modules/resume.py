"""What Lightning's loops have to be told so that a run goes on exactly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def begin_next_epoch(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint of an epoch's last batch into one of the beginning of the next epoch.

    Callbacks save behind a batch, before Lightning has counted it, and the epoch that ends with it. Lightning 2.6 goes
    on from such a checkpoint, but counts the next epoch as begun before: a second checkpoint, in that epoch or after,
    is then taken for one between two epochs, and the batches that it had seen come again.

    Args:
        checkpoint: as Lightning hands it to `on_load_checkpoint`; changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    total, whole = batches["total"], epochs["total"]
    uncounted = total["ready"] == total["started"] == total["processed"] == total["completed"] + 1
    amid = whole["ready"] == whole["started"] == whole["processed"] + 1 == whole["completed"] + 1
    if not (batches["is_last_batch"] and uncounted and amid):
        return
    total["completed"] += 1
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    for counts in (epochs["total"], epochs["current"]):
        counts["processed"] = counts["completed"] = counts["started"]
        counts["ready"] = counts["started"] + 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def forget_restart(loop: _TrainingEpochLoop) -> None:
    """Let an epoch that `begin_next_epoch` has begun be one like others.

    Where a validation comes every so many batches, Lightning 2.6 takes the beginning of such an epoch for a place where
    one has just been, skips it together with a batch that it does not take, and counts that batch on the curves.

    Args:
        loop: as it is when training starts, before its first batch.
    """
    if loop.restarted_on_last and loop.batch_progress.current.ready == 0:
        loop.restarting = False
        loop.reset_restart_stage()
