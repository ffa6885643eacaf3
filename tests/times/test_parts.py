"""Times of parts: their densities, what identifies a draw, the laws, clean context, padding, and what is refused.

False alarms as in test_times.py: a Kolmogorov-Smirnov distance of n draws exceeds 2.7 / sqrt(n) with a chance of 1e-6.
"""

import functools
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy import stats
from shared import part as choice
from shared import schedule_of
from torch.utils.data import DataLoader

from diffaug import (
    EDM,
    ContextParts,
    DiffusionDataModule,
    ForwardProcess,
    FusedSNR,
    IndependentParts,
    LinearBeta,
    LogitNormal,
    MinSNR,
    MonotoneParts,
    Offset,
    Parts,
    Pyramid,
    Rectified,
    SharedParts,
    Sobol,
    Stratified,
    TwoLevelParts,
    Uniform,
)
from diffaug.randomness.keys import Keys
from diffaug.targets import IMAGE_FIELDS, NUMBER_FIELDS
from diffaug.times import Independent, PartLaw

DRAWS, FRAMES = 20_000, 5
KS = 2.7 / math.sqrt(DRAWS)
CLIPS = (torch.arange(6 * 8 * 2 * 4 * 4) * 37 % 251).to(torch.uint8).view(6, 8, 2, 4, 4)
INDEX = torch.tensor([5, 0, 3, 2**33 + 7, 1, 4])
LAWS = {
    "independent": IndependentParts(),
    "shared": SharedParts(0.3),
    "monotone": MonotoneParts(),
    "two_level": TwoLevelParts(0.25),
    "context": ContextParts(2),
    "context, noised": ContextParts(2, level=0.1, others=SharedParts()),
    "context, then rising": ContextParts(2, others=MonotoneParts()),
}
UNIFORM_DRAWS = ("independent", "shared", "two_level")
ANY = [law for law in LAWS.values() if law.context == 0 or law.level is None]


@functools.cache
def drawn(law: PartLaw, coverage=Independent(), seed: int = 3) -> torch.Tensor:  # noqa: B008 - frozen
    """The unit times of many samples' frames, float64, shape (DRAWS, FRAMES)."""
    keys, position = Keys.pack(torch.arange(DRAWS), seed=seed), torch.arange(DRAWS)
    shape, times = (DRAWS, FRAMES, 1), Uniform(coverage=coverage)
    return Parts(1, law=law).draw(keys, Rectified(), times, position, shape, torch.device("cpu")).double()


def clips(law: PartLaw, schedule=LinearBeta(), images=CLIPS, index=INDEX, **options):  # noqa: B008 - frozen
    call = {name: options.pop(name) for name in ("position", "stage", "epoch", "extra") if name in options}
    process = ForwardProcess(schedule, parts=Parts(1, law=law), **{"compile": False, **options})
    return process(images, index, seed=7, **call)


@pytest.mark.parametrize(
    ("law", "coverage"),
    [*((law, Independent()) for law in UNIFORM_DRAWS), ("shared", Stratified()), ("two_level", Sobol())],
    ids=repr,
)
def test_each_part_has_the_chosen_density(law, coverage):
    for part in drawn(LAWS[law], coverage).unbind(1):
        assert stats.kstest(part.numpy(), "uniform").statistic < KS


@pytest.mark.parametrize("law", UNIFORM_DRAWS)
def test_each_part_has_any_density(law):
    """Logit-normal on a schedule, and each timestep of a discrete one: of frames, of tokens, of patches of clips."""
    keys, device = Keys.pack(torch.arange(DRAWS), seed=3), torch.device("cpu")
    t = Parts(2, law=LAWS[law]).draw(keys, Rectified(), LogitNormal(), None, (DRAWS, 4, FRAMES), device).double()
    for part in t.unbind(1):
        assert stats.kstest(torch.logit(part).numpy(), "norm").statistic < KS
    parts = Parts([1, -2, -1], [1, 2, 2], law=LAWS[law])
    t = parts.draw(keys, LinearBeta(timesteps=4), Uniform(), None, (DRAWS, 2, 1, 4, 2), device)
    assert t.shape == (DRAWS, 2, 2, 1)
    assert t.dtype == torch.int64
    for part in t.flatten(1).unbind(1):
        assert stats.chisquare(torch.bincount(part, minlength=4).numpy()).pvalue > 1e-6


def test_parts_are_independent():
    t = drawn(IndependentParts())
    correlation = np.corrcoef(t.numpy().T)[np.triu_indices(FRAMES, 1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)
    late = t[:, 0] > t[:, 1]  # beyond correlation: the first two in each of four cells
    assert stats.binomtest(int(late.sum()), DRAWS, 0.5).pvalue > 1e-6


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_as_many_samples_share_a_time_as_were_asked_for(probability):
    t = drawn(SharedParts(probability))
    shared = (t == t[:, :1]).all(1)
    assert stats.binomtest(int(shared.sum()), DRAWS, probability).pvalue > 1e-6
    rest = t[~shared]
    assert ((rest[:, 1:] != rest[:, :-1]).all(1)).all()  # either all, or each its own
    both = drawn(IndependentParts())[~shared]
    assert torch.equal(rest, both)  # which are those that they have without sharing


def test_monotone_parts_are_sorted_draws():
    t = drawn(MonotoneParts())
    assert (t.diff(dim=1) >= 0).all()
    assert torch.equal(t, drawn(IndependentParts()).sort(1).values)
    for k, part in enumerate(t.unbind(1)):  # order statistics of uniform draws
        assert stats.kstest(part.numpy(), stats.beta(k + 1, FRAMES - k).cdf).statistic < KS


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_two_levels(share):
    t, one = drawn(TwoLevelParts(share)), drawn(SharedParts(1.0))
    at_s = t != one
    assert all(len(row.unique()) <= 2 for row in t[:500])
    assert stats.binomtest(int(at_s.sum()), t.numel(), share).pvalue > 1e-6
    if share == 0.25:
        s = torch.where(at_s, t, torch.nan).nanmean(1)
        both = at_s.any(1)
        below = (s < one[:, 0])[both]
        assert stats.binomtest(int(below.sum()), int(both.sum()), 0.5).pvalue > 1e-6  # unsorted
        assert stats.kstest(s[both].numpy(), "uniform").statistic < 2.7 / math.sqrt(int(both.sum()))
        assert stats.binomtest(int((at_s[:, 0] & at_s[:, 1]).sum()), DRAWS, share**2).pvalue > 1e-6


@pytest.mark.parametrize("law", LAWS)
def test_a_clip_cut_short_keeps_its_times(law):
    whole, cut = clips(LAWS[law]).t, clips(LAWS[law], images=CLIPS[:, :4]).t
    assert cut.shape == (6, 4)
    if "rising" in law or law == "monotone":
        assert not torch.equal(whole[:, :4], cut)  # sorting is of what there is
    else:
        assert torch.equal(whole[:, :4], cut)


def test_patches_keep_their_times_however_the_image_is_cut():
    parts = Parts([-2, -1], 4)
    images = torch.zeros(6, 3, 16, 24, dtype=torch.uint8)
    process = ForwardProcess(LinearBeta(), parts=parts, compile=False)
    whole, cut = process(images, INDEX).t, process(images[..., :8, :12], INDEX).t
    assert torch.equal(whole[:, :2, :3], cut)


@pytest.mark.slow
def test_compiled_draws_depend_on_the_sample_alone():
    law, options = ContextParts(2, others=SharedParts()), {"fields": ("x_t", "epsilon", "t"), "compile": True}
    whole = clips(law, **options)
    parts = [clips(law, images=CLIPS[rows], index=INDEX[rows], **options) for rows in ([4, 1], [0], [5, 3, 2])]
    for name in whole._fields:
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name)[[4, 1, 0, 5, 3, 2]]), name


EVERY = (*(name for name in IMAGE_FIELDS if name != "score"), *NUMBER_FIELDS, "weight")


@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified(), EDM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("images", [CLIPS, CLIPS.float() / 125 - 1], ids=["bytes", "floats"])
def test_parts_at_one_time_are_the_bits_of_none(schedule, images):
    options = {"fields": EVERY, "weight": MinSNR(), "target": "v", "compile": False}
    one = ForwardProcess(schedule, **options)(images, INDEX, seed=7)
    same = clips(SharedParts(1.0), schedule, images, **options)
    for name in EVERY:
        value = getattr(one, name)
        value = value[:, None].expand(-1, 8) if value.ndim == 1 else value
        assert torch.equal(value, getattr(same, name)), name


def oracle(schedule, x_0, epsilon, t):
    """x_t by the definition, frame by frame, in float64; clean where t says so."""
    alpha, sigma = schedule.alpha_sigma(t.clamp_min(0), torch.float64)
    clean = t < 0 if schedule.discrete else t <= 0
    alpha, sigma = torch.where(clean, 1, alpha), torch.where(clean, 0, sigma)
    wide = (*t.shape, *(1,) * (x_0.ndim - t.ndim))
    return alpha.view(wide) * x_0.double() + sigma.view(wide) * epsilon.double()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified()], ids=lambda s: type(s).__name__)
def test_each_part_is_mixed_at_its_own_time(law, schedule):
    batch = clips(LAWS[law], schedule, fields=("x_t", "epsilon", "x_0", "t", "alpha", "sigma"))
    torch.testing.assert_close(
        batch.x_t.double(), oracle(schedule, batch.x_0, batch.epsilon, batch.t), rtol=0, atol=1e-6
    )
    assert batch.alpha.shape == batch.sigma.shape == batch.t.shape == (6, 8)
    process = ForwardProcess(schedule, parts=Parts(1, law=LAWS[law]))
    assert torch.equal(process.mix(CLIPS, batch.t, batch.epsilon), batch.x_t)
    with pytest.raises(ValueError, match=r"t must be a tensor of shape \(6, 8\), one time for each part"):
        process.mix(CLIPS, batch.t[:, :4], batch.epsilon)


@pytest.mark.parametrize(
    ("parts", "shape", "counts"),
    [
        (Parts(1), (6, 8, 3, 4, 4), (8,)),
        (Parts(1, 2), (6, 8, 3, 4, 4), (4,)),
        (Parts(2, 2), (6, 3, 8, 4, 4), (4,)),
        (Parts(1), (6, 10, 7), (10,)),
        (Parts((-2, -1), 2), (6, 3, 4, 6), (2, 3)),
        (Parts((1, -2, -1), (1, 2, 4)), (6, 5, 2, 4, 8), (5, 2, 2)),
    ],
)
@pytest.mark.parametrize("noise", [None, Offset(), Pyramid()], ids=["gaussian", "offset", "pyramid"])
def test_where_parts_may_lie(parts, shape, counts, noise):
    if isinstance(noise, Pyramid) and len(shape) == 3:
        return
    x_0 = (torch.arange(math.prod(shape)) * 37 % 251).view(shape).float() / 125 - 1
    options = {} if noise is None else {"noise": noise}
    process = ForwardProcess(Rectified(), parts=parts, fields=("x_t", "epsilon", "t"), compile=False, **options)
    x_t, epsilon, t = process(x_0, INDEX)
    assert t.shape == (6, *counts)
    spread = t.double()
    for axis in range(1, len(shape)):  # one t for each element
        axes = [a % len(shape) for a in parts.axis]
        if axis in axes:
            spread = spread.repeat_interleave(parts.block[axes.index(axis)], axis)
        else:
            spread = spread.unsqueeze(axis).expand(*spread.shape[:axis], shape[axis], *spread.shape[axis:])
    torch.testing.assert_close(x_t.double(), (1 - spread) * x_0.double() + spread * epsilon.double(), rtol=0, atol=1e-6)
    of_one = parts.mean(x_t)  # and the mean of each part
    assert of_one.shape == t.shape
    torch.testing.assert_close(of_one.mean(), x_t.mean())


@pytest.mark.parametrize("law", [ANY[-1], *(pytest.param(law, marks=pytest.mark.slow) for law in ANY[:-1])], ids=repr)
def test_every_schedule_under_every_law_is_finite(schedule, law):
    """Also where a part is clean, at the least and the most noise, and at the ends of what is drawn."""
    fields = (*IMAGE_FIELDS, *NUMBER_FIELDS, "weight", "part_mask")
    schedule = schedule.at_shape((1, 1, 2, 2))  # shifted_by_tokens counts those of an image, not of a clip
    for weight, target in ((FusedSNR(), "v"), (MinSNR(), "x_0")):
        process = ForwardProcess(
            schedule, parts=Parts(1, law=law), fields=fields, weight=weight, target=target, compile=False
        )
        batch = process(torch.rand(40, 6, 1, 2, 2) * 2 - 1, torch.arange(40))
        for name in fields:
            if name == "score" and not (batch.sigma > 0).all():
                continue
            assert getattr(batch, name).isfinite().all(), name
        assert (batch.weight >= 0).all()


def test_clean_context():
    for schedule, clean in ((LinearBeta(), -1), (Rectified(), 0), (schedule_of("ve"), 0)):
        fields = ("x_t", "x_0", "epsilon", "v", "F", "score", "t", "part_mask", *NUMBER_FIELDS, "weight")
        fields = tuple(dict.fromkeys(fields))
        batch = clips(ContextParts(2), schedule, fields=fields, target="v", weight=MinSNR())
        assert (batch.t[:, :2] == clean).all()
        assert (batch.t[:, 2:] > clean).all()
        assert torch.equal(batch.x_t[:, :2], batch.x_0[:, :2])
        assert torch.equal(batch.v[:, :2], batch.epsilon[:, :2])
        assert (batch.score[:, :2] == 0).all()
        assert batch.score.isfinite().all()
        assert batch.part_mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]] * 6
        assert torch.equal(batch.weight == 0, batch.part_mask == 0)
        assert (batch.alpha[:, :2] == 1).all()
        assert (batch.sigma[:, :2] == 0).all()
        assert (batch.unit[:, :2] == 0).all()
        assert (batch.log_snr[:, :2] > 33).all()
        assert (batch.c_noise[:, :2] < -4).all()
        plain = clips(IndependentParts(), schedule, fields=("x_t", "t"))
        assert torch.equal(plain.t[:, 2:], batch.t[:, 2:])  # the rest is what it is without
        assert torch.equal(plain.x_t[:, 2:], batch.x_t[:, 2:])


def test_context_that_is_lightly_noised():
    batch = clips(ContextParts(3, level=0.1), fields=("t", "part_mask", "sigma"))
    assert (batch.t[:, :3] == 100).all()
    assert (batch.sigma > 0).all()
    assert batch.part_mask.sum(1).tolist() == [5] * 6
    assert torch.allclose(clips(ContextParts(3, level=0.1), Rectified()).t[:, :3], torch.tensor(0.1))


def test_padding_is_not_to_be_learned():
    length = torch.tensor([8, 3, 1, 8, 5, 2])
    real = torch.arange(8) < length[:, None]
    process = ForwardProcess(
        LinearBeta(), parts=Parts(1, law=ContextParts(1), padding="real"), fields=("t", "part_mask", "weight", "real")
    )
    batch = process(CLIPS, INDEX, extra={"real": real})
    assert torch.equal(batch.part_mask, (real & (torch.arange(8) > 0)).float())
    assert torch.equal(batch.weight, batch.part_mask)
    with pytest.raises(
        ValueError, match=r"real, process\.parts\.padding, must be of shape \(6, 8\), t's, but got .*4\)"
    ):
        process(CLIPS, INDEX, extra={"real": real[:, :4]})


@pytest.mark.parametrize("stage", ["val", "predict"])
def test_evaluation_has_parts_too(stage):
    batch = clips(ContextParts(1), stage=stage)
    assert torch.equal(batch.t, clips(ContextParts(1), stage=stage, epoch=3).t)
    assert (batch.t[:, 0] == -1).all()
    assert len(batch.t[:, 1:].unique()) > 20


class Inner(pl.LightningDataModule):
    def train_dataloader(self):
        real = torch.arange(8) < torch.tensor([[8], [3], [1], [8], [5], [2]])
        rows = [{"clip": clip, "real": some} for clip, some in zip(CLIPS, real, strict=True)]
        return DataLoader(rows, batch_size=4)


def test_a_datamodule_hands_out_parts_owned_and_wrapped():
    parts = Parts(1, law=ContextParts(1), padding="real")
    process = ForwardProcess(LinearBeta(), parts=parts, fields=("x_t", "t", "part_mask", "real"), compile=False)
    inner = Inner()
    modules = [
        DiffusionDataModule(train=inner.train_dataloader().dataset, image_key="clip", process=process, shuffle=False),
        DiffusionDataModule.wrap(inner, process, image_key="clip"),
    ]
    for data, size in zip(modules, (32, 4), strict=True):
        data.setup("fit")
        batches = [data.noise(batch) for batch in data.train_dataloader()]
        assert len(batches[0].t) == min(size, 6)
        t, mask = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("t", "part_mask"))
        rows = inner.train_dataloader().dataset
        alone = process(CLIPS, torch.arange(6), extra={"real": torch.stack([row["real"] for row in rows])})
        assert torch.equal(t, alone.t)
        assert torch.equal(mask, alone.part_mask)
    assert modules[0].recipe()["parts"] == repr(parts)


def test_what_is_compiled_before_a_clip_is_seen_has_such_parts(monkeypatch):
    """A wrapped DataModule's images are not known in setup: what is tried there must have the parts."""
    tried = []
    for parts in (
        Parts(1, 5, ContextParts(40)),
        Parts(2),
        Parts([-2, -1], 4),
        Parts([1, -2, -1], [1, 4, 4]),
        Parts([2, 3, 4], 2),
        Parts(1, dims=5),
    ):
        process = ForwardProcess(LinearBeta(), parts=parts, compile=False)
        with monkeypatch.context() as patch:
            patch.setattr(ForwardProcess, "compiles", lambda *_: True)
            patch.setattr(ForwardProcess, "can_compile", lambda process, image, *_: tried.append(image) or True)
            DiffusionDataModule.wrap(Inner(), process, image_key="clip").setup("fit")
        t = process(tried[-1], torch.zeros(1, dtype=torch.int64)).t
        assert t.shape[1:] == parts.counts(tried[-1].shape)
    assert len(tried) == 6


SHAPE = tuple(CLIPS.shape)
RISING, REAL = ContextParts(1, others=MonotoneParts()), {"padding": "real"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parts(0), r"process\.parts\.axis must be an axis of the images, but not 0"),
        (lambda: Parts([]), r"process\.parts\.axis must be an axis"),
        (lambda: Parts(1.5), r"process\.parts\.axis"),
        (lambda: Parts(1, 0), r"process\.parts\.block must be a whole number >= 1, but got 0"),
        (lambda: Parts([1, 2], [1, 1, 1]), r"process\.parts\.block must be one number, or one for each of the 2 axes"),
        (lambda: Parts(law="shared"), r"process\.parts\.law must be a PartLaw, .* part_law@process\.parts\.law=shared"),
        (lambda: Parts(padding=3), r"process\.parts\.padding must be the name of a field"),
        (lambda: Parts(law=MonotoneParts(), **REAL), r"process\.parts\.law=.* sorts padding too.*padding out"),
        (lambda: Parts(law=RISING, **REAL), r"process\.parts\.law=.* sorts padding too.*padding out"),
        (lambda: ContextParts(others=ContextParts()), r"process\.parts\.law\.others must be a law without a context"),
        (lambda: Parts(1, dims=1), r"process\.parts\.dims must be a whole number >= 2, but got 1"),
        (lambda: choice("parts", "frames").planes((4, 3, 8, 8)), r"dims=5 wants .* shape \(4, 3, 8, 8\)"),
        (lambda: choice("parts", "tokens").planes((4, 3, 8, 8)), r"dims=3 wants .* shape \(4, 3, 8, 8\)"),
        (lambda: Parts(2).planes((6, 8, 1, 4, 4)), r"makes one part of each sample, of images of shape \(6, 8"),
        (lambda: Parts([-2, -1], 4).planes((6, 8, 1, 4, 4)), r"makes one part of each sample, of images of shape"),
        (lambda: clips(ContextParts(8)), r"process\.parts\.law\.count=8 leaves nothing to learn of 8 parts"),
        (lambda: Parts(5).planes(SHAPE), r"must be an axis from 1 to 4 of images.*got \(5,\)"),
        (lambda: Parts(-5).planes(SHAPE), r"axis from 1 to 4"),
        (lambda: Parts([-1, -2]).planes(SHAPE), r"or a list of them, rising"),
        (
            lambda: Parts(1, 3).planes(SHAPE),
            r"process\.parts\.block must be a divisor of 8, the size of axis 1 of imag",
        ),
        (lambda: Parts([1, 2, 3]).planes((1, 2**10 + 1, 2, 2)), r"\.block .* at most 1024 parts along axis 1"),
    ],
)
def test_what_are_no_parts_is_refused(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


def test_parts_are_values():
    parts = Parts([1, -1], 2, ContextParts(2, others=SharedParts(0.25)), "real")
    assert eval(repr(parts)) == parts
    assert hash(parts) == hash(Parts((1, -1), (2, 2), parts.law, "real"))
