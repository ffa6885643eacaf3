"""Laws of a pair's times that go by a sample's place: roles, groups, curricula; the same for any batches and ranks."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from diffaug import DiffusionDataModule, ForwardProcess
from diffaug.loader.training import EpochSampler
from diffaug.order.epoch import Shuffled
from diffaug.randomness.keys import Keys
from diffaug.schedules import EDM, Rectified, Trigonometric
from diffaug.targets import Pair
from diffaug.times import (
    Antithetic,
    ConstantDecrement,
    DyadicStep,
    LogNormal,
    Neighbours,
    PairPlaces,
    SigmaRatio,
    Stratified,
    TwoDraws,
    Uniform,
)


def of(law: Any, count: int, times: Any = Uniform(), schedule: Any = Rectified(), begin: int = 0) -> Any:  # noqa: B008
    """t, s and the share's draws of samples at places from ``begin`` on."""
    index = torch.arange(begin, begin + count)
    keys = Keys.pack(index, seed=3)
    return law.draw(keys, schedule, times, times.draw(keys, schedule, index), PairPlaces(index, index))


def test_roles_are_even_over_every_batch():
    t, s = of(DyadicStep(7, 0.75), 64 * 100)
    step, consistent = (t - s).view(100, 64), (s < t).view(100, 64)
    assert (consistent.sum(1) == 16).all()
    for k in range(7):
        count = (step == 2.0**-k).sum(1)
        assert ((count >= 1) & (count <= 4)).all()
    for size in (5, 24, 100, 1000):  # of any run, from any place
        counts = consistent.flatten().unfold(0, size, 1).sum(1)
        assert (counts.double() - size / 4).abs().max() < 2
    for ranks in (2, 4, 8):  # and of each rank's share
        for rank in range(ranks):
            assert (consistent.flatten()[rank::ranks].view(-1, 64 // ranks).sum(1) == 16 // ranks).all()


@pytest.mark.parametrize("coverage", [Stratified(), Antithetic()])
def test_roles_are_apart_from_stratified_times(coverage: Any):
    index = torch.arange(2**13)
    keys = Keys.pack(index, seed=3)
    drawn_t = Uniform(coverage=coverage).draw(keys, Rectified(), index)
    t, s = DyadicStep(7, 0.5).draw(keys, Rectified(), Uniform(), drawn_t, PairPlaces(index))
    for role in (s == t, s < t):
        counts = torch.histc(drawn_t[role], 16, 0, 1)
        assert (counts / role.sum() - 1 / 16).abs().max() < 5 * (1 / 16 / role.sum().item()) ** 0.5


def test_a_decrement_is_of_eta_on_any_schedule():
    t, s = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.0, 0.0, 0.899])
    r = ConstantDecrement(12).between(Trigonometric(), t, s).double()
    expected = (2 / math.pi * torch.atan(torch.tan(t.double() * math.pi / 2) - 160 / 4096)).maximum(s.double())
    torch.testing.assert_close(r, expected, rtol=1e-5, atol=1e-6)


def test_groups_share_their_times():
    law = ConstantDecrement(group=4)
    t, s = of(law, 4000)
    groups = t.view(-1, 4), s.view(-1, 4)
    assert all((group == group[:, :1]).all() for group in groups)
    assert len(t.unique()) == 1000
    part = of(law, 8, begin=96)
    assert torch.equal(part[0], t[96:104])
    assert torch.equal(part[1], s[96:104])
    x_0, index = torch.randn(8, 1, 4, 4), torch.arange(8)
    process = ForwardProcess(Rectified(), fields=("x_t", "epsilon", "x_r", "x_s", "t", "r", "s"), pair=Pair(law))
    batch: Any = process(x_0, index, position=index)
    assert len(batch.epsilon[:, 0, 0, 0].unique()) == 8
    for state, time in ((batch.x_r, batch.r), (batch.x_s, batch.s)):
        u = time[:, None, None, None]
        torch.testing.assert_close(state, (1 - u) * x_0 + u * batch.epsilon, rtol=1e-5, atol=1e-5)


def test_ranks_are_handed_whole_groups():
    order = Shuffled(30, seed=1)
    dealt = [list(EpochSampler(order, rank=rank, ranks=2, group=4)) for rank in range(2)]
    assert [len(places) for places in dealt] == [16, 16]
    for rank, places in enumerate(dealt):
        numbers = [place.position // 4 for place in places]
        assert numbers == [number for number in range(rank, 8, 2) for _ in range(4)]
    assert sorted(place.position for places in dealt for place in places) == list(range(32))
    one = list(EpochSampler(order, rank=0, ranks=1, group=4))
    assert {place for places in dealt for place in places} == set(one)


KS = (0, 1, 99, 100, 777, 4999, 5000, 79_999, 80_000, 99_999, 100_000, 10**7, 2**53)


def test_grids_grow_as_their_sources_say():
    k = torch.tensor(KS)
    ours = Neighbours(11, 1281, 100_000).cells(torch.zeros(len(KS)), PairPlaces(None, k)) + 1
    length = math.floor(100_000 / (math.log2(1280 // 10) + 1))
    assert ours.tolist() == [min(10 * 2 ** (k // length), 1280) + 1 if k < 10**6 else 1281 for k in KS]
    ours = Neighbours(2, 151, 100_000, "square_root").cells(torch.zeros(len(KS)), PairPlaces(None, k)) + 1
    share = [min(k / 100_000, 1) for k in KS]
    assert ours.tolist() == [max(math.ceil(math.sqrt(x * (151**2 - 2**2) + 2**2) - 1), 1) + 1 for x in share]
    assert (ours[0], ours[-1]) == (2, 151)


def test_stages_rise_as_in_ect():
    law = SigmaRatio(last_stage=8, samples=25_600_000)
    for handed in (0, 3_199_999, 3_200_000, 9_600_000, 25_599_999, 25_600_000, 2**53):
        stage = min(handed // 3_200_000, 7) + 1
        t = torch.full((5,), 3.0)
        some = Keys.pack(torch.arange(5)), EDM(), LogNormal(), t
        _, s = law.draw(*some, PairPlaces(None, torch.full((5,), handed)))
        _, fixed = SigmaRatio(stage=stage).draw(*some, PairPlaces())
        assert torch.equal(s, fixed)


def process_of(law: Any, schedule: Any = EDM()) -> ForwardProcess:  # noqa: B008
    third = ("r",) if law.third else ()
    fields = ("x_t", "t", "s", "index", *third)
    return ForwardProcess(schedule, LogNormal(-1.1, 2.0), fields=fields, pair=Pair(law), compile=False)


def data_of(process: ForwardProcess, batch_size: int, ranks: int = 1, rank: int = 0, **options: Any) -> Any:
    images: Any = [torch.full((1, 4, 4), number, dtype=torch.uint8) for number in range(48)]
    data: Any = DiffusionDataModule(train=images, val=images, process=process, batch_size=batch_size, **options)
    data._ranks = lambda: {"rank": rank, "ranks": ranks}
    data.setup()
    return data


def times_of(data: Any, epochs: int = 2, skip: int = 0) -> dict[tuple[int, int], tuple[float, float]]:
    """(t, s) by epoch and sample, of the batches after the first ``skip``."""
    loader, found = data.train_dataloader(), {}
    if skip:
        loader.load_state_dict({"epoch": 0, "batches": skip})
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            made = data.noise(batch)
            numbers = zip(made.index.tolist(), made.t.tolist(), made.s.tolist(), strict=True)
            found |= {(epoch, index): times for index, *times in numbers}
    return found


@pytest.mark.parametrize(
    "law",
    [
        Neighbours(11, 1281, 60),
        *(pytest.param(law, marks=pytest.mark.slow) for law in (SigmaRatio(last_stage=8, samples=60), DyadicStep())),
        pytest.param(ConstantDecrement(group=2), marks=pytest.mark.slow),
    ],
)
def test_the_same_for_any_batches_and_ranks_and_after_a_resume(law: Any):
    process = process_of(law)
    whole = times_of(data_of(process, 4))
    assert len(whole) == 2 * 48
    assert times_of(data_of(process, 16)) == whole
    dealt = [times_of(data_of(process, 4, 3, rank)) for rank in range(3)]
    assert {key: value for part in dealt for key, value in part.items()} == whole
    rest = times_of(data_of(process, 4), skip=5)
    assert len(rest) == 2 * 48 - 20
    assert rest.items() <= whole.items()


def test_a_curriculum_goes_by_samples_and_ends():
    law = SigmaRatio(last_stage=8, samples=80)
    data = data_of(process_of(law), 8, views=2)
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            handed = batch.places[0].rows[:, 6]
            assert handed.tolist() == list(range(epoch * 48 + number * 8, epoch * 48 + number * 8 + 8))
            made = data.noise(batch)
            stage = (1 + handed.repeat_interleave(2) // 10).clamp_max(8)
            ratio = (1 - (1 + 8 * torch.sigmoid(-made.t.double())) / 2.0**stage).clamp_min(0)
            torch.testing.assert_close(made.s.double(), made.t * ratio, rtol=1e-5, atol=1e-30)
    made = data.noise(next(iter(data.val_dataloader())), stage="val")
    ratio = 1 - (1 + 8 * torch.sigmoid(-made.t.double())) / 2.0**8
    torch.testing.assert_close(made.s.double(), made.t * ratio, rtol=1e-5, atol=0)


def test_weights_are_their_sources():
    t, s = torch.tensor([2.0, 5.0]), torch.tensor([1.5, 4.0])
    torch.testing.assert_close(Neighbours().weight(EDM(), t, s, 0.5), torch.tensor([2.0, 1.0]))
    sigma = t
    torch.testing.assert_close(SigmaRatio().weight(EDM(), t, s, 0.5), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    u = torch.tensor([0.2, 0.9])
    theirs = 0.5 * torch.sigmoid(5 - 2 * torch.log((1 - u) / u)) * 2 / (u * (1 - u)) * (1 - u) / ((1 - u) ** 2 + u**2)
    torch.testing.assert_close(ConstantDecrement().weight(Rectified(), u, u / 2, 0.5), theirs)
    assert (TwoDraws().weight(EDM(), t, s, 0.5) == 1).all()


@pytest.mark.slow
def test_a_third_time_goes_through_the_compiled_pass():
    fields = ("x_t", "epsilon", "x_r", "x_s", "t", "r", "s")
    options: dict[str, Any] = {"fields": fields, "pair": Pair(ConstantDecrement())}
    x_0, index = torch.randn(8, 1, 4, 4), torch.arange(8)
    eager = ForwardProcess(Rectified(), compile=False, **options)(x_0, index, position=index)
    process = ForwardProcess(Rectified(), compile=True, **options)
    assert process.can_compile(x_0)
    for one, other in zip(eager, process(x_0, index, position=index), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_wrapped_loader_keeps_no_groups():
    inner: Any = pl.LightningDataModule()
    with pytest.raises(
        ValueError, match=r"ConstantDecrement\(.* wants groups of samples in one process, .*give its data"
    ):
        DiffusionDataModule.wrap(inner, process_of(ConstantDecrement()))


def test_a_stream_has_no_curriculum():
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(1, 4, 4, dtype=torch.uint8)] * 4)

    data: Any = DiffusionDataModule(train=Stream(), process=process_of(Neighbours(11, 1281, 60)), batch_size=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"handed=None: .*a stream's samples it cannot count"):
        data.noise(next(iter(data.train_dataloader())))


def call(law: Any, **places: Any) -> None:
    process_of(law)(torch.zeros(2, 1, 2, 2), torch.arange(2), **places)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call(Neighbours(11, 1281, 100)), r"Neighbours\(.* goes by how many .* handed=None.*a stream's"),
        (lambda: call(DyadicStep()), r"DyadicStep\(.* goes by the sample's place in the epoch's order.*position=None"),
        (lambda: SigmaRatio(last_stage=4), r"pair\.times\.last_stage and pair\.times\.samples make a curriculum tog"),
        (lambda: SigmaRatio(samples=4), r"make a curriculum together, but got None and 4: set both, or neither"),
        (lambda: Neighbours(11, 11, 5), r"pair\.times\.last_points must be greater than pair\.times\.points, 11, but"),
        (
            lambda: data_of(process_of(ConstantDecrement(group=4)), 6).train_dataloader(),
            r"data\.batch_size must be a multiple of pair\.times\.group, 4, but got 6",
        ),
    ],
)
def test_what_has_no_place_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
