"""How eight ways to make batches of aspect-ratio buckets share out the samples.

    python benchmarks/buckets.py

The rules are those of public code, read on 2026-11-27 (docs/buckets.md says which and where), each written anew in a
few lines, as its trainer sets it. They are run on buckets that make it hard: of 1, 3, G - 1, G and 10 G + 7 samples.
A rule yields the steps of one epoch after another; a step holds a batch for each rank, G samples where none is short.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from random import Random
from typing import Any, NamedTuple

import numpy as np

from diffaug.loader.training import EpochSampler
from diffaug.order.laps import Bucketed

Sample = tuple[int, int]  # its bucket, and its number there
Batch = list[Sample]
Step = list[Batch]
Rule = Callable[[list[Batch], int, int, int], Iterator[list[Step]]]


def diffaug(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Each bucket is an endless stream of laps, and steps are consecutive slices of the streams."""
    samples = list(chain(*buckets))
    bucket_of = np.array([bucket for bucket, _ in samples])
    orders = [Bucketed(bucket_of, size, seed=seed, fixed=False) for _ in range(ranks)]  # each process has its own
    samplers = [EpochSampler(order, rank=rank, ranks=ranks) for rank, order in enumerate(orders)]
    for epoch in count():
        shares: list[list[Batch]] = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            shares.append(cut([samples[place.index] for place in sampler], size // ranks))
        yield [list(step) for step in zip(*shares, strict=True)]


def kohya(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Cut each shuffled bucket into ranks' batches, the last one short; shuffle these, and deal them to the ranks."""
    random = Random(seed)
    while True:
        batches = list(chain(*(cut(shuffle(bucket, random), size // ranks) for bucket in buckets)))
        batches = shuffle(batches, random)
        yield cut(batches + batches[: -len(batches) % ranks], ranks)


def diffusers(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Cut each shuffled bucket into whole ranks' batches; shuffle these, and deal them to the ranks."""
    random = Random(seed)
    while True:
        batches = list(chain(*(cut_whole(shuffle(bucket, random), size // ranks) for bucket in buckets)))
        yield cut_whole(shuffle(batches, random), ranks)


def simpletuner(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Share each bucket out to the ranks, once and for all; one too small for a step is repeated to fill it.

    Each rank goes round its buckets, and fills a bucket's last batch up with any samples of that bucket.
    """
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    for bucket in buckets:
        bucket, many = shuffle(bucket, Random(seed)), len(bucket)
        if many < size:
            many = -(-many * -(-size // many) // size) * size  # whole steps of whole repeats
            bucket = (bucket * many)[:many]
        for rank, share in enumerate(shares):
            part = bucket[many * rank // ranks : many * (rank + 1) // ranks]
            share.append((part + bucket[-1:])[: -(-many // ranks)])
    runs = [_go_round(share, size // ranks, Random(seed + rank)) for rank, share in enumerate(shares)]
    for epoch in zip(*runs, strict=True):
        yield [list(step) for step in zip(*epoch, strict=True)]


def _go_round(share: list[Batch], size: int, random: Random) -> Iterator[list[Batch]]:
    at = -1
    while True:
        batches, seen, going = [], Counter[Sample](), list(share)
        at %= len(going)
        while going:
            at = (at + 1) % len(going)
            left = list((Counter(going[at]) - seen).elements())
            if not left:
                going.pop(at)
                continue
            batch = random.sample(left, min(size, len(left)))
            while len(batch) < size:
                batch += random.sample(going[at], min(size - len(batch), len(going[at])))
            seen.update(batch)
            batches.append(batch)
        yield batches


def onetrainer(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Cut each shuffled bucket into whole steps, and shuffle these."""
    random = Random(seed)
    while True:
        steps = list(chain(*(cut_whole(shuffle(bucket, random), size) for bucket in buckets)))
        yield [split(step, ranks) for step in shuffle(steps, random)]


def diffusion_pipe(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Cut each bucket, in an order of its own, into whole steps; one shuffled order of these, for every epoch."""
    random = Random(seed)
    steps = list(chain(*(cut_whole(shuffle(bucket, random), size) for bucket in buckets)))
    steps = [split(step, ranks) for step in shuffle(steps, random)]
    while True:
        yield steps


def open_sora(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Cut what does not fill a rank's batch off each bucket, then shuffle; deal the shuffled batches to the ranks."""
    share = size // ranks
    kept = [bucket[: len(bucket) // share * share] for bucket in buckets]
    for epoch in count(seed):
        random = Random(epoch)
        batches = list(chain(*(cut(shuffle(bucket, random), share) for bucket in kept)))
        yield cut_whole(shuffle(batches, random), ranks)


def nemo(buckets: list[Batch], size: int, ranks: int, seed: int) -> Iterator[list[Step]]:
    """Go through one bucket after another, each shuffled, padded to a multiple of the ranks and cut to whole steps."""
    for epoch in count(seed):
        random = Random(epoch)
        steps: list[Batch] = []
        for bucket in shuffle(buckets, random):
            bucket = shuffle(bucket, random)
            steps += cut_whole(bucket + (bucket * ranks)[: -len(bucket) % ranks], size)
        yield [split(step, ranks) for step in steps]


RULES: dict[str, tuple[Rule, str]] = {
    "kohya-ss sd-scripts": (kohya, "if asked, by reading up to there"),
    "diffusers": (diffusers, "no, the epoch begins anew"),
    "SimpleTuner": (simpletuner, "what was not seen, on as many ranks"),
    "OneTrainer": (onetrainer, "yes, on as many ranks"),
    "diffusion-pipe": (diffusion_pipe, "yes"),
    "Open-Sora": (open_sora, "yes"),
    "NeMo Automodel": (nemo, "yes"),
    "diffaug": (diffaug, "yes, on any ranks"),
}
"""The rules, and whether a run that was stopped goes on inside an epoch: read, not measured."""


def cut(items: list[Any], size: int) -> list[Any]:
    return [items[low : low + size] for low in range(0, len(items), size)]


def cut_whole(items: list[Any], size: int) -> list[Any]:
    return cut(items[: len(items) // size * size], size)


def split(step: Batch, ranks: int) -> Step:
    return [step[rank::ranks] for rank in range(ranks)]


def shuffle(items: list[Any], random: Random) -> list[Any]:
    return random.sample(items, len(items))


class Count(NamedTuple):
    """What a rule did in so many epochs.

    Attributes:
        samples, steps: how many there are.
        never: samples that never came.
        apart: the most that the visits of two samples of one bucket differ, after any of the epochs. Laps: 1.
        off: the most that a bucket's visits differ from its share, by its samples, of all visits. Laps: less than G.
        short: steps of fewer than G samples.
        mixed: steps whose ranks have not all the same shape.
        seen: the samples of each step, sorted.
    """

    samples: int
    steps: int
    never: int
    apart: int
    off: float
    short: int
    mixed: int
    seen: list[Batch]


def hard_sizes(size: int) -> list[int]:
    """Return the numbers of samples of the buckets, for global batches of this size."""
    return [1, 3, size - 1, size, 10 * size + 7]


def enough_epochs(size: int) -> int:
    """Return some epochs more than in which a bucket of 1 is due one whole step."""
    return size + 6


def measure(rule: Rule, size: int, ranks: int, epochs: int = 0, seed: int = 0) -> Count:
    """Run a rule for so many epochs, or enough for a bucket of 1 to have its step, and count what it did."""
    buckets = [[(bucket, number) for number in range(many)] for bucket, many in enumerate(hard_sizes(size))]
    samples = sum(map(len, buckets))
    visits, steps, apart, off = Counter[Sample](), list[Step](), 0, 0.0
    for epoch in islice(rule(buckets, size, ranks, seed), epochs or enough_epochs(size)):
        steps += epoch
        visits.update(sample for step in epoch for batch in step for sample in batch)
        for bucket in buckets:
            of_bucket = [visits[sample] for sample in bucket]
            apart = max(apart, max(of_bucket) - min(of_bucket))
            off = max(off, abs(sum(of_bucket) - visits.total() * len(bucket) / samples))
    seen = [sorted(chain(*step)) for step in steps]
    shapes = [len({bucket for bucket, _ in step}) for step in seen]
    short = sum(len(step) < size for step in seen)
    mixed = sum(many > 1 for many in shapes)
    return Count(samples, len(steps), samples - len(visits), apart, off, short, mixed, seen)


def tell(size: int) -> list[str]:
    """Write the table, as lines of Markdown, of one rank and two."""
    head = ("", "never seen", "visits apart", "share off", "short", "mixed", "2 ranks as 1", "resumes inside an epoch")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, (rule, resumes) in RULES.items():
        counts = [measure(rule, size, ranks) for ranks in (1, 2)]
        cells = [
            [f"{count.never}" for count in counts],
            [f"{count.apart}" for count in counts],
            [f"{count.off / size:.1f}" if count.off >= size else "< 1" for count in counts],
            [f"{count.short / count.steps:.0%}" for count in counts],
            [f"{count.mixed / count.steps:.0%}" for count in counts],
        ]
        same = counts[0].seen == counts[1].seen
        row = [name, *(" / ".join(cell) for cell in cells), "yes" if same else "no", resumes]
        lines.append(f"| {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    for size in (4, 24):
        buckets, epochs = hard_sizes(size), enough_epochs(size)
        print(f"Global batches of {size}, buckets of {buckets} samples, {epochs} epochs, 1 / 2 ranks\n")
        print(*tell(size), "", sep="\n")
