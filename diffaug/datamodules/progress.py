"""Progress of a run in its training data: read from the Trainer's own counters, and set to go on from there.

A run's place is one pair of numbers: the epoch, and how many of its batches are done. A batch is done once its step has
been taken: one that was handed out and failed comes again. An epoch is over when its last batch is done; one that was
cut off by ``max_steps``, a callback or a time limit is not, though Lightning then counts it as over.

Lightning has many states between two batches, each with its own way of going on, and not all of them go on with the
next batch. So whatever the hook that a checkpoint was saved in, the counters are set to one of two: those of a
checkpoint saved at a batch's end, or those of an epoch that has not begun. All use of Lightning's private names for
this is in this module.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class EpochProgress(NamedTuple):
    """The epoch, and how many of its batches are done."""

    epoch: int
    batches: int


def current_epoch(trainer: Any) -> int:
    """Return the epoch of a training; 0 without a Trainer."""
    return trainer.current_epoch if trainer else 0


def read_progress(trainer: Any) -> EpochProgress:
    """Read how far the training is: in any hook, during an exception, between two fits."""
    epoch, batch = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    if epoch.ready > epoch.started or epoch.ready == 0:
        return EpochProgress(epoch.processed, 0)
    number: int = epoch.started - 1
    done: int = batch.current.processed
    over = done >= trainer.num_training_batches or (batch.is_last_batch and done == batch.current.ready)
    return EpochProgress(number + 1, 0) if over else EpochProgress(number, done)


def count_done(trainer: Any) -> int:
    """Count the batches whose step has been taken, over all epochs; right even while a batch is being handed out."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def read_stepped(trainer: Any) -> int:
    """Read how many batches stepped the optimizer, as Lightning counts them for its loggers."""
    loop = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    # It counts a batch only after the validation that follows it.
    waits = current.completed < current.processed or (trainer.validating and trainer.state.fn == "fit")
    return loop._batches_that_stepped + (waits and not loop._should_accumulate())


def set_progress(trainer: Any, progress: EpochProgress, stepped: int) -> None:
    """Set the counters of the training, so that it goes on with the batch after those that are done.

    Arguments:
        progress: where the training goes on.
        stepped: as `read_stepped` gave it there.
    """
    fit, (epoch, batches) = trainer.fit_loop, progress
    states = fit._combined_loader_states_to_load
    state = fit.state_dict()
    inside = int(batches > 0)
    epochs, steps = state["epoch_progress"], state["epoch_loop.batch_progress"]
    before = epochs["total"]["started"] - epochs["current"]["started"]  # epochs of fits before the one counted
    validation = "epoch_loop.val_loop.batch_progress"
    goes_on = not 0 <= trainer.max_steps <= trainer.global_step
    recounted = inside and goes_on and batches % trainer.accumulate_grad_batches == 0
    state |= {
        "epoch_progress": _counters(
            epoch + inside, before + epoch + inside, {"processed": inside, "completed": inside}
        ),
        "epoch_loop.batch_progress": {
            **_counters(batches, steps["total"]["processed"], {"completed": inside}),
            "is_last_batch": False,
        },
        validation: {**_counters(0, state[validation]["total"]["processed"], {}), "is_last_batch": False},
        # Going on from a batch's end, Lightning counts that batch as one that stepped.
        "epoch_loop.state_dict": {"_batches_that_stepped": stepped - recounted},
    }
    fit.load_state_dict(state)
    fit._combined_loader_states_to_load = states
    if not inside:  # it begins an epoch, and is within nothing that could be begun again
        loop = next(base for base in type(fit).__mro__ if base.__name__ == "_Loop")
        loop.restarting.fset(fit, False)


def _counters(current: int, total: int, unfinished: dict[str, int]) -> dict[str, Any]:
    """Return Lightning's counters of something, with how far some of its stages are behind."""

    def stages(count: int) -> dict[str, int]:
        return {name: count - unfinished.get(name, 0) for name in ("ready", "started", "processed", "completed")}

    return {"total": stages(total), "current": stages(current)}


def replace_states(trainer: Any, loaders: Sequence[Any], ours: type, state: Any) -> None:
    """Put ``state`` in the place of what a checkpoint holds for each of our loaders; other loaders keep theirs.

    Arguments:
        loaders: all loaders of the training that Lightning gives a state, in its order.
    """
    states = trainer.fit_loop._combined_loader_states_to_load
    if len(states) == len(loaders):
        trainer.fit_loop._combined_loader_states_to_load = [
            state if isinstance(loader, ours) else its for loader, its in zip(loaders, states, strict=True)
        ]
