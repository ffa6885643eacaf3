"""Datasets asked for by Place: each item an image tensor, with its place.

A dataset yields what it likes: a PIL image, a tensor or a numpy array, alone, in a tuple, a dict or a named tuple.
`Images` finds the image, applies the user's transform, checks it and hands it on with its `Place`; uint8 stays uint8,
so that a quarter of the bytes cross to the accelerator.

The user's random transforms run under random states that are keyed by the sample and put back afterwards: flips and
crops too are the same for any number of workers, after any resume.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset, Subset, TensorDataset

from diffaug.checks import guess
from diffaug.datasets.mixture import Mixture
from diffaug.images.aligned import TOGETHER, Aligned
from diffaug.images.items import as_tensor, check_range, name_parts, take_apart
from diffaug.loader.batch import Place, Sample
from diffaug.randomness.keys import COUNTED_BITS
from diffaug.randomness.user_code import call_keyed, detect_draws, mix_key
from diffaug.store.reader import Store
from diffaug.targets import FIELDS


class Keyed(Dataset[Any]):
    """A dataset asked for by `Place`, whose items' own random draws are functions of ``domain`` and their places.

    What the dataset and the transform draw from torch's, numpy's and Python's global random states is a function of
    ``domain`` and the sample's epoch, index and view. A dataset that can fetch many items at once (``__getitems__``:
    Hugging Face's can) is asked for a batch's items together, unless it is seen to draw something in doing so: then
    one by one, so that each draw is its sample's.

    Arguments:
        dataset: the user's: map-style, or, read by a `diffaug.loader.stream.Stream`, iterable.
        name: how error messages call the dataset, for example ``data.train``.
        domain: what the random state of the transforms is keyed by, beside the sample's place.
    """

    def __init__(self, dataset: Any, *, name: str = "data.train", domain: tuple[int, ...] = (0,)) -> None:
        self.dataset, self.name, self.domain = dataset, name, domain
        self._in_batches = _fetches_many(dataset)

    def finished(self, placed: tuple[Place, Any]) -> Any:
        """Turn an item of the dataset and its place into a sample."""
        place, item = placed
        return item, place

    def may_draw(self) -> bool:
        """Return whether reading an item may draw random numbers; asked for each batch: a transform may be set late."""
        return _may_draw(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def place(self, index: int) -> Place:
        """Return a place of this sample, outside of any order."""
        dataset, index = self.dataset.locate(index) if isinstance(self.dataset, Mixture) else (0, index)
        return Place(index, 0, 0, 0, dataset)

    def where(self, place: Place) -> str:
        """Name a sample as error messages do."""
        of_set = f"[{self.dataset.names[place.dataset]!r}]" if isinstance(self.dataset, Mixture) else ""
        return f"{self.name}{of_set}[{place.index}]"

    def __getitems__(self, places: Sequence[Place]) -> list[Any]:
        fetched = self._fetched([place.index for place in places]) if self._in_batches else None
        if not self.may_draw():
            if fetched is None:
                return [self.read(place) for place in places]
            return [self.finished(placed) for placed in zip(places, fetched, strict=True)]
        if fetched is None:
            return call_keyed(self.read, places, self.seeds(places))
        return call_keyed(self.finished, list(zip(places, fetched, strict=True)), self.seeds(places))

    def seeds(self, places: Sequence[Place]) -> list[int]:
        """Return the seed of the random states for the sample at each of these places: 64 bits."""
        *domain, number = self.domain
        epochs = {place[3:5]: mix_key(*domain, number + place.dataset, place.epoch) for place in places}
        return [mix_key(place.view << COUNTED_BITS ^ place.index, state=epochs[place[3:5]]) for place in places]

    def __getitem__(self, place: Place) -> Any:
        return self.__getitems__([place])[0]

    def _fetched(self, indices: list[int]) -> list[Any] | None:
        """Fetch items many at once; None if the dataset cannot, or draws something in doing so."""
        try:
            items, drew = detect_draws(lambda: self.dataset.__getitems__(indices))
        except Exception:  # fetched one by one, the error will name its sample
            return None
        if drew or len(items) != len(indices):
            self._in_batches = False
            return None
        return items

    def read(self, place: Place) -> Any:
        """Read the sample at a place, under the random states as they are."""
        return self.finished((place, self.item(place)))

    def item(self, place: Place) -> Any:
        """Read the dataset's own item at a place; its errors get a note of which it is."""
        try:
            dataset = self.dataset.sets[place.dataset] if isinstance(self.dataset, Mixture) else self.dataset
            return dataset[place.index]
        except Exception as error:
            note(error, f"in reading {self.where(place)}")
            raise


class Images(Keyed):
    """A dataset whose items are (image, place, extra), ready for `collate`.

    Arguments:
        dataset, name, domain: as in `Keyed`.
        transform: applied to the image as the dataset yields it, or to all images of an item together.
        aligned: which part of an item is the image, and which others keep in step with it.
        wanted: the names of the extra parts to keep.
        value_range: what float images must lie in; None for latents.
        check_range: whether float images are checked here (not where a device transform comes later).

    Attributes:
        moved_by: how errors call the transform that flips or crops; None where there is none.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        transform: Callable[[Any], Any] | None = None,
        aligned: Aligned = Aligned(),  # noqa: B008 - never changed
        wanted: Sequence[str] = (),
        value_range: tuple[float, float] | None = (-1.0, 1.0),
        name: str = "data.train",
        check_range: bool = True,
        domain: tuple[int, ...] = (0,),
    ) -> None:
        super().__init__(dataset, name=name, domain=domain)
        self.transform, self.aligned = transform, aligned
        self.wanted, self.value_range, self.check_range = tuple(wanted), value_range, check_range
        self._named = "data.transform" if name.startswith("data.train") else "data.eval_transform"
        self.moved_by = self._named if transform is not None else None if check_range else "data.device_transform"
        self._looked = False
        if type(dataset) is Store:
            dataset.copies = transform is not None  # without one, collate alone reads the images, and copies them

    def may_draw(self) -> bool:
        return self.transform is not None or super().may_draw()

    def finished(self, placed: tuple[Place, Any]) -> Sample:
        place, item = placed
        where = self.where(place)
        image, extra = take_apart(item, self.aligned.target, where)
        if self.moved_by and self.wanted and not self._looked:
            self.aligned.check_declared(name_parts(item), image, self.wanted, where, self.moved_by, batch=False)
            self._looked = True
        image, extra = self.aligned.read(image, extra, where, self.value_range)
        if self.transform is not None:
            try:
                image, extra = self.aligned.transform(self.transform, image, extra, where, self._named)
            except Exception as error:
                note(error, f"in {self._named} of {where}{TOGETHER if self.aligned.beside else ''}")
                raise
            image, extra = self.aligned.read(image, extra, where, self.value_range)
        tensor = as_tensor(image, where, self.value_range)
        if self.check_range:  # a device transform may make other sizes yet
            self.aligned.check_sizes(tensor, extra, where, batch=False)
        if self.check_range and tensor.is_floating_point():
            check_range(tensor, self.value_range, where)
        for name in self.aligned.conditions if self.check_range else ():
            if extra[name].is_floating_point():
                self.aligned.check_range(name, extra[name], self.value_range, where)
        if not self.wanted:
            return tensor, place, {}
        missing = [name for name in self.wanted if name not in extra]
        if missing:
            has = f"beside the image {', '.join(extra)}" if extra else "nothing beside the image"
            raise ValueError(
                f"process.fields asks for {missing}, but {where} holds {has}, and diffaug names no such field"
                + guess(missing, [*FIELDS, *extra])
            )
        return tensor, place, {name: extra[name] for name in self.wanted}


def note(error: Exception, note: str) -> None:
    """Say at which sample the user's code failed (Python 3.10 has no notes)."""
    if hasattr(error, "add_note"):
        error.add_note(note)


def _whole(dataset: Any) -> Any:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _fetches_many(dataset: Any) -> bool:
    """Return whether a dataset itself can fetch many items at once. (A Subset has only its dataset's way.)"""
    return callable(getattr(_whole(dataset), "__getitems__", None))


def _may_draw(dataset: Any) -> bool:
    """Return whether a dataset's code may draw random numbers: all but a few that are known not to.

    To seed three random states takes 11 microseconds, more than all else that is done for a small image.
    """
    dataset = _whole(dataset)
    if type(dataset) is Mixture:
        return any(map(_may_draw, dataset.sets))
    if type(dataset).__module__ in ("torchvision.datasets.mnist", "torchvision.datasets.cifar"):
        return dataset.transform is not None or dataset.target_transform is not None
    return dataset.draws if type(dataset) is Store else type(dataset) is not TensorDataset
