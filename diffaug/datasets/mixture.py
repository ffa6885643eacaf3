"""A mixture: several training sets, each of which has its share of every global batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from diffaug.checks import integer, number, refuse
from diffaug.datasets.indexed import describe_dataset, index_dataset, is_function, is_stream
from diffaug.randomness.keys import DATASET_BITS


class Mixture(Dataset[Any]):
    """Several datasets to train on together.

    Every global batch, of all ranks, holds each set by its weight, rounded down or up to a whole sample. Each set is
    gone through in laps of its own order, so its samples are visited evenly whatever its weight. There is no state: an
    interrupted run goes on exactly, on any number of ranks with the same global batch. The field ``dataset`` says which
    set a sample is of, by its number.

    Arguments:
        sets: the map-style datasets by name, or functions without arguments that make them. Their items must be alike.
        weights: the shares by name, each >= 0, of any sum; None gives each set its size, so that all samples are
            visited alike. To change them at the beginning of an epoch, give them by epoch:
            ``{0: {"photos": 3, "art": 1}, 10: {"photos": 1, "art": 1}}``.
        samples: how many samples an epoch has, rounded up to whole global batches; None is as many as the sets hold.

    Raises:
        ValueError: no sets, weights that do not fit them, or sum to 0.

    For example:

        mixture = Mixture({"photos": photos, "art": art}, weights={"photos": 3, "art": 1})
        data = DiffusionDataModule(train=mixture, process=ForwardProcess(Cosine()), batch_size=64)
    """

    def __init__(
        self,
        sets: Mapping[str, Any],
        weights: Mapping[Any, Any] | None = None,
        *,
        samples: int | None = None,
    ) -> None:
        if not isinstance(sets, Mapping) or not 0 < len(sets) <= 2**DATASET_BITS:
            raise refuse("Mixture's sets", sets, "datasets by name, for example {'photos': photos, 'art': art}")
        self.sources = {str(name): source for name, source in sets.items()}
        self.names = list(self.sources)
        self.samples = None if samples is None else integer("Mixture's samples", samples, 1)
        self._weights = None if weights is None else self._by_epoch(weights)
        self.sets: list[Any] = []

    def _by_epoch(self, weights: Any) -> dict[int, list[float]]:
        wanted = f"a weight for each of {self.names}, or these by the epoch from which they hold"
        if not isinstance(weights, Mapping) or not weights:
            raise refuse("Mixture's weights", weights, wanted)
        by_epoch = weights if all(isinstance(key, int) for key in weights) else {0: weights}
        for epoch, of_epoch in by_epoch.items():
            integer("an epoch of Mixture's weights", epoch, 0)
            if not isinstance(of_epoch, Mapping) or set(map(str, of_epoch)) != set(self.names):
                raise refuse("Mixture's weights", of_epoch, wanted)
            for name, weight in of_epoch.items():
                number(f"Mixture's weight of {name!r}", weight, at_least=0)
            if not sum(of_epoch.values()) > 0:
                raise refuse("Mixture's weights", dict(of_epoch), "not all 0: no set would have a share")
        if 0 not in by_epoch:
            raise refuse("Mixture's weights", sorted(by_epoch), "weights from epoch 0 on too")
        plain = {epoch: {str(name): float(weight) for name, weight in by_epoch[epoch].items()} for epoch in by_epoch}
        return {epoch: [plain[epoch][name] for name in self.names] for epoch in sorted(plain)}

    def build(self) -> "Mixture":
        """Make the datasets of functions, and refuse what cannot be mixed."""
        self.sets = []
        for name, source in self.sources.items():
            where = f"set {name!r} of the Mixture"
            dataset = index_dataset(source() if is_function(source) else source, where)
            if (
                is_stream(dataset)
                or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))
                or isinstance(dataset, Mixture)
            ):
                raise refuse(where, dataset, "a map-style dataset, with a length and items by index")
            if getattr(dataset, "bucket_of", None) is not None:
                raise refuse(where, dataset, "a dataset of one shape: buckets cannot be mixed with other sets")
            if len(dataset) < 1:
                raise refuse(where, dataset, "a dataset of one sample at least")
            self.sets.append(dataset)
        return self

    @property
    def sizes(self) -> list[int]:
        """The number of samples of each set."""
        return [len(dataset) for dataset in self.sets]

    @property
    def weights(self) -> dict[int, Sequence[float]]:
        """The sets' weights, by the epoch from which they hold."""
        return {0: self.sizes} if self._weights is None else dict(self._weights)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Any:
        dataset, within = self.locate(index)
        return self.sets[dataset][within]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the set, and the index in it, of a sample numbered through all sets."""
        for dataset, size in enumerate(self.sizes):
            if index < size:
                return dataset, index
            index -= size
        raise IndexError(index)

    def recipe(self) -> dict[str, Any]:
        """Return what a resume compares."""
        sets = dict(zip(self.names, map(describe_dataset, self.sets), strict=True))
        return {"sets": sets, "weights": repr(self._weights), "samples": self.samples}
