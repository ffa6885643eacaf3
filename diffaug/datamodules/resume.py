"""Resume: loaders that begin where a checkpoint's run was, or a refusal.

What a checkpoint holds of the data is one pair of numbers, the epoch and how many batches of it are done, with what a
batch and an epoch then were. All else is a function of these. A run that goes on in another shape (batch size, ranks)
goes on after the same samples where these are a whole number of its own batches.
"""

import logging
from collections.abc import Sequence
from typing import Any

from diffaug.datamodules.progress import (
    EpochProgress,
    read_progress,
    read_stepped,
    replace_states,
    set_progress,
)
from diffaug.datamodules.recipe import check_ranks, check_recipe
from diffaug.loader.stream import StreamLoader
from diffaug.loader.training import EpochLoader, TrainingLoader

_log = logging.getLogger("diffaug")


class Resume:
    """How far the training is in its data, for the checkpoints; and how the loaders are made to go on from there.

    Arguments:
        allow: whether a checkpoint of another recipe may be gone on from, as nearly as can be.
    """

    def __init__(self, allow: bool) -> None:
        self.allow = allow
        self._loaders: list[Any] = []
        self._loaded: dict[str, Any] | None = None  # a checkpoint's, until loaders are made to begin there
        self._waiting: dict[str, Any] | None = None  # likewise, until their first batch has come
        self._new = True  # whether no loaders have been made in this fit

    def begin_fit(self) -> None:
        """Begin a fit; a checkpoint's state, if any, comes after this."""
        self._loaded, self._waiting, self._new = None, None, True

    def begin_batch(self) -> None:
        """Note that a training batch has come: the Trainer's counters are right from here on."""
        self._waiting = None

    def load(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state."""
        self._loaded = state

    def announce(self, trainer: Any) -> None:
        """Set the Trainer's epoch before the user's code makes the loaders: they may be of the epoch."""
        if trainer and self._loaded:
            place = EpochProgress(self._loaded["epoch"], self._loaded["batches"])
            set_progress(trainer, place, self._loaded["stepped"])

    def state(self, trainer: Any) -> dict[str, Any]:
        """Return how far the training is: plain numbers and texts."""
        if self._loaded or self._waiting:
            return self._loaded or self._waiting or {}
        epoch, batches = read_progress(trainer)
        return {
            "epoch": epoch,
            "batches": batches,
            "stepped": read_stepped(trainer),
            "loaders": [describe_loader(loader) for loader in self._loaders],
            "batch": [getattr(loader, "global_batch", None) for loader in self._loaders],
            "epoch_images": self._epoch_images(trainer.num_training_batches),
        }

    def begin(self, trainer: Any, loaders: Sequence[Any], mode: str = "max_size_cycle") -> None:
        """Let new training loaders begin where the run is.

        Arguments:
            loaders: all that the training goes through side by side.
            mode: that of Lightning's CombinedLoader.

        Raises:
            ValueError: they cannot.
        """
        earlier = self.state(trainer) if trainer else {}  # of the loaders before these
        self._loaders = list(loaders)
        for loader in loaders:
            if isinstance(loader, TrainingLoader):
                loader.cycles = mode == "max_size_cycle"
        if trainer is None or trainer.state.fn != "fit":
            return
        loaded, self._loaded, new, self._new = self._loaded, None, self._new, False
        now = read_progress(trainer)
        begins = loaded or now._asdict()  # a checkpoint that only some nodes see would let the others begin anew
        where = {"begins at": f"epoch {begins['epoch']}, batch {begins['batches']}"}
        check_ranks(trainer, {**_numbered([describe_loader(loader) for loader in loaders]), **where})
        if loaded is None:
            if new and trainer.ckpt_path is not None and now != (0, 0):
                self._refuse(
                    f"The checkpoint {trainer.ckpt_path} does not say where its training was in its data: it was saved "
                    "without this DataModule, or with one of another class. Resume with the DataModule it was made with"
                )
            if now.batches == 0 or not new:
                return  # the beginning of an epoch, where Lightning is right
            loaded = earlier  # a fit of this Trainer was cut off here
        if trainer.fast_dev_run:
            raise ValueError(
                "trainer.fast_dev_run goes through a few batches from the beginning, and not on from a checkpoint: set "
                "ckpt_path=null, or fast_dev_run=false."
            )
        batches = _batches([*loaders], mode, trainer.limit_train_batches)
        of_the_epoch = trainer.reload_dataloaders_every_n_epochs > 0
        progress = self._converted(loaded, self._epoch_images(batches), batches, of_the_epoch)
        set_progress(trainer, progress, loaded["stepped"])
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            _log.warning(
                "ReduceLROnPlateau: Lightning keeps no metric in a checkpoint and passes over the first one after it. "
                "The images go on exactly, the learning rate may fall later than it would have."
            )
        for loader in loaders:
            if isinstance(loader, TrainingLoader):
                loader.load_state_dict(progress._asdict())
        replace_states(
            trainer, [x for x in loaders if hasattr(x, "load_state_dict")], TrainingLoader, progress._asdict()
        )
        self._waiting = {**self.state(trainer), **progress._asdict(), "stepped": loaded["stepped"]}
        self._waiting["epoch_images"] = self._epoch_images(batches)

    def _converted(
        self, loaded: dict[str, Any], epoch_images: list[int | None], count: float, of_the_epoch: bool
    ) -> EpochProgress:
        """Convert a checkpoint's place to batches of the loaders of now, of which an epoch has ``count``."""
        epoch, done = loaded["epoch"], loaded["batches"]
        if not loaded["loaders"]:
            return EpochProgress(epoch, done)
        if len(loaded["loaders"]) != len(self._loaders):
            raise ValueError(
                f"The checkpoint is of {len(loaded['loaders'])} training loaders side by side, but now there are "
                f"{len(self._loaders)}: resume with as many."
            )
        ours = [describe_loader(loader) for loader in self._loaders]
        advice = ""
        if done == 0 and of_the_epoch:
            advice = (
                "\nOr were these loaders of the epoch (trainer.reload_dataloaders_every_n_epochs)? Those of an epoch "
                "that had not begun are not in the checkpoint; if they are meant to differ, "
                "data.allow_changed_recipe=true goes on exactly."
            )
        check_recipe(_numbered(ours), _numbered(loaded["loaders"]), self.allow, advice)
        for before, now in zip(loaded["epoch_images"], epoch_images, strict=True):
            if before != now:
                self._refuse(
                    f"An epoch of this run goes through {before} images, but now it would go through {now}. Set "
                    "trainer.limit_train_batches, data.drop_last and the batch size so that it is as it was"
                )
        places = {
            self._place(loader, done, before) for loader, before in zip(self._loaders, loaded["batch"], strict=True)
        }
        if len(places) > 1:
            self._refuse(
                "The batch sizes of loaders side by side have changed by different factors since the checkpoint was "
                "saved inside an epoch. Change all by one factor"
            )
        place = min(places)
        return EpochProgress(epoch + 1, 0) if place >= count else EpochProgress(epoch, place)

    def _place(self, loader: Any, done: int, before: int | None) -> int:
        """Return how many of a loader's batches are those that were done, of ``before`` images each."""
        if not done:
            return 0
        if not isinstance(loader, TrainingLoader) or before is None:
            if not hasattr(loader, "load_state_dict"):
                self._refuse(
                    f"The checkpoint was saved after {done} batches of an epoch, but a {type(loader).__qualname__} can "
                    "only be begun at its beginning: some of its batches would come twice and others never. Resume "
                    "from a checkpoint of an epoch's end, or give a loader with state_dict and load_state_dict"
                )
            return done
        whole, rest = divmod(done * before, loader.global_batch)
        order = loader.sampler.order if isinstance(loader, EpochLoader) else None
        why = f"of which {done * before} images are no whole number" if rest else ""
        if before != loader.global_batch and isinstance(loader, StreamLoader):
            why = "and a stream goes on exactly only in the same batches"
        elif before != loader.global_batch and order and done * before >= order.length:
            why = "and a loader that has begun again beside a longer one goes on exactly only in the same batches"
        if why:
            self._refuse(
                f"The checkpoint was saved inside an epoch, after {done} batches of {before} images on all ranks "
                f"together. A batch is now one of {loader.global_batch}, {why}. Set data.batch_size times the number "
                f"of devices to {before} again"
            )
        return whole

    def _epoch_images(self, batches: float) -> list[int | None]:
        """Return how many different images of each loader an epoch of so many batches has; None where unknown."""
        return [
            int(min(batches * loader.global_batch, loader.sampler.order.length, len(loader) * loader.global_batch))
            if isinstance(loader, EpochLoader)
            else None
            for loader in self._loaders
        ]

    def _refuse(self, why: str) -> None:
        if not self.allow:
            raise ValueError(f"{why}, or set data.allow_changed_recipe=true to go on as nearly as can be.")
        _log.warning("%s; going on as nearly as can be.", why)


def describe_loader(loader: Any) -> dict[str, Any]:
    """Describe what the order of a training loader's samples depends on, in plain types."""
    if isinstance(loader, EpochLoader):
        order = loader.sampler.order
        return {"images": order.size, "order": order.describe()}
    if isinstance(loader, StreamLoader):
        return {"order": "the stream's", "ranks": loader.dataset.ranks, "workers": loader.num_workers}
    return {"order": f"that of a {type(loader).__qualname__}"}


def _numbered(loaders: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(loaders) == 1:
        return {"train": loaders[0]}
    return {f"train[{number}]": loader for number, loader in enumerate(loaders)}


def _batches(loaders: Sequence[Any], mode: str, limit: float) -> float:
    """Return how many batches an epoch has."""
    lengths = [_length(loader) for loader in loaders]
    if isinstance(limit, int):
        counts = [min(length, limit) for length in lengths]
    else:
        counts = [length if length == float("inf") else int(length * limit) for length in lengths]
    return min(counts) if mode == "min_size" else max(counts)


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # the second from a loader over a dataset that has none
        return float("inf")
