"""What a process refuses: components that are none, or make no sense together, and calls of its methods."""

import pytest
import torch

from diffaug import (
    Debiased,
    Discretised,
    ForwardProcess,
    Importance,
    LinearBeta,
    LogNormal,
    MinSNR,
    Pair,
    Parts,
    Rectified,
    Sobol,
    StudentT,
    Uniform,
    ZeroTerminalSNR,
)
from diffaug.randomness.keys import Keys
from diffaug.times import ConstantDecrement, DyadicStep, Neighbours, SigmaRatio, TwoDraws

IMAGES = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
FLOATS = IMAGES.float()
INDEX = torch.arange(64)
T = torch.full((64,), 5)
IMM = Pair(ConstantDecrement())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, r"process.schedule must be a Schedule object, but got 'linear'"),
        ({"value_range": (1, -1)}, r"process.value_range must be .* low < high"),
        ({"value_range": 4}, r"process.value_range must be .* or null for latents"),
        ({"compile": "yes"}, r"process.compile must be one of True, False, 'auto'"),
        ({"fields": "x_t"}, r"process.fields must be a list"),
        ({"fields": ("t", "t")}, r"process.fields must be a list of different names"),
        ({"dtype": torch.int64}, r"process.dtype must be a floating point"),
        ({"schedule": Rectified(), "times": Importance()}, r"Rectified\(\) is continuous.*schedule=discretised"),
        ({"fields": ("x_t", "score"), "noise": StudentT()}, r"only for standard normal noise.*noise=gaussian"),
        ({"fields": ("v", "weight"), "weight": MinSNR()}, r"weight is for process\.target=epsilon: set process\.targ"),
        ({"schedule": ZeroTerminalSNR(LinearBeta()), "weight": Debiased()}, r"infinite at t = 999.*SNR is 0.*min_snr"),
        # pairs
        ({"pair": "same"}, r"^pair must be a Pair object or None, which pair=meanflow, say, sets on the command line"),
        ({"fields": ("x_t", "x_s", "t")}, r"asks for \['x_s'\], an earlier state .* pair does not say which"),
        ({"pair": Pair(noise="chain"), "fields": ("x_t", "s"), "noise": StudentT()}, r"chain's law needs standard no"),
        ({"pair": Pair(SigmaRatio())}, r"SigmaRatio\(.* of continuous time, but LinearBeta\(.* discrete.*schedule=edm"),
        ({"pair": Pair(Neighbours())}, r"Neighbours\(points=18, .* is a law of continuous time, but LinearBeta\(.*"),
        ({"pair": Pair(DyadicStep())}, r"DyadicStep\(levels=7, equal=0\.75\) is a law of continuous time, but Linear"),
        ({"pair": IMM, "fields": ("x_t", "r")}, r"ConstantDecrement\(.* is a law of continuous time, but LinearBeta"),
        ({"pair": Pair(TwoDraws()), "times": Importance()}, r"makes a t of its own, .* Importance.*times=uniform"),
        ({"pair": Pair(TwoDraws(second=LogNormal(40)))}, r"every draw would fall on one end"),
        (
            {"pair": Pair(TwoDraws())},
            r"TwoDraws\(.* is drawn, but none of process\.fields tells it: add s, and x_s for",
        ),
        ({"pair": Pair()}, r"is drawn, .*or another of x_s, s, interval, same"),
        (
            {"schedule": Rectified(), "pair": Pair(DyadicStep()), "times": Uniform(coverage=Sobol())},
            r"DyadicStep\(.* spreads its roles by Sobol's sequence, and Uniform\(.* its t, so that one would tell",
        ),
        (
            {"schedule": Rectified(), "pair": IMM, "fields": ("x_t", "t", "s")},
            r"ConstantDecrement\(.* draws a third time, r, but none of process\.fields tells it: add r",
        ),
        (
            {"schedule": Rectified(), "pair": Pair(TwoDraws()), "fields": ("x_t", "t", "x_r")},
            r"process\.fields asks for \['x_r'\], a time between s and t, but pair\.times=TwoDraws\(.*pair=imm",
        ),
        (
            {"schedule": Rectified(), "pair": Pair(ConstantDecrement(), "chain"), "fields": ("x_r", "t")},
            r"x_r shares the noise of x_t and x_s, but pair\.noise=chain gives x_s its own",
        ),
        # parts
        ({"parts": 3}, r"process\.parts must be a Parts object or None"),
        ({"parts": Parts(1), "pair": Pair()}, r"pair is of two times a sample, process\.parts of one for each part: s"),
        ({"parts": Parts(1), "times": Importance()}, r"process\.parts gives each part a .*learns"),
        ({"parts": Parts(1, padding="real")}, r"process\.parts\.padding=real is a field of the dataset.*: add it"),
    ],
)
def test_components_that_make_no_sense_together_are_refused(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ForwardProcess(**{"schedule": LinearBeta(), **options})


def test_importance_goes_with_any_discrete_schedule():
    assert ForwardProcess(Discretised(Rectified()), Importance()).schedule.discrete


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(IMAGES), r"pass index=, the images' numbers .* or\s+generator="),
        (lambda p: p(IMAGES, INDEX[:3]), r"index must be a tensor of shape \(64,\), the number of each image"),
        (
            lambda p: p(IMAGES.long(), INDEX),
            r"x_0 must be a tensor of uint8 or float images.* torch\.int64 of shape \(64,",
        ),
        (lambda p: p(IMAGES, INDEX, stage="fit"), r"stage must be one of"),
        (lambda p: p(IMAGES.float().requires_grad_(), INDEX), r"x_0 requires a gradient.*by\s+process\.mix\(x_0, t, "),
        (lambda p: p(IMAGES, INDEX, extra={"t": INDEX}), r"dataset yields \['t'\], which diffaug itself names"),
        (lambda p: ForwardProcess(LinearBeta(), fields=("x_t", "lable"))(IMAGES, INDEX), r"asks for \['lable'\]"),
        (lambda p: p.draw(IMAGES, Keys.pack(INDEX[:1])), r"key must be a tensor of shape \(6, 64\), one key for"),
        (lambda p: p.mix(IMAGES, T + 995, IMAGES), r"wants t as int64 in \[0, 999\]"),
        (lambda p: p([[1]], INDEX), r"x_0 must be a tensor of uint8 or float images, .*, but got \[\[1\]\] \(list\)"),
        (lambda p: p(IMAGES[:2], [0, 1]), r"index must be a tensor of shape \(2,\), .*, but got \[0, 1\] \(list\)"),
        (lambda p: p(IMAGES[:1], INDEX[0]), r"index must be a tensor of shape \(1,\), .*torch\.int64 of shape \(\)"),
        (lambda p: p(IMAGES, generator=0), r"generator must be a torch\.Generator, such as .*, but got 0 \(int\)"),
        (lambda p: p.mix(IMAGES, 5, IMAGES), r"t must be a tensor of shape \(64,\), one time .* got 5 \(int\)"),
        (lambda p: p.mix(IMAGES, INDEX[:1], IMAGES), r"t must be a tensor of shape \(64,\), .* of shape \(1,\)"),
        (
            lambda p: p.mix(IMAGES, T, IMAGES[:, :1]),
            r"epsilon must be .* \(64, 3, 8, 8\), as x_0 is, but got .*64, 1, 8",
        ),
        (lambda p: p.mix(5, INDEX, IMAGES), r"x_0 must be a tensor of uint8 or float images, .* got 5 \(int\)"),
        (lambda p: p.step(IMAGES, INDEX, INDEX, IMAGES), r"x_s must be a tensor of float images, .* torch\.uint8 of"),
        (lambda p: p.step(FLOATS, 4, INDEX, FLOATS), r"s must be a tensor of shape \(64,\), .* got 4 \(int\)"),
        (lambda p: p.step(FLOATS, INDEX, INDEX, FLOATS[:3]), r"epsilon must be .* \(64, 3, 8, 8\), as x_s is"),
        (lambda p: p.posterior(FLOATS, FLOATS[:, :1], INDEX), r"x_t must be .* \(64, 3, 8, 8\), as x_0 is"),
        (lambda p: p.posterior(FLOATS, FLOATS, 5), r"t must be a tensor of shape \(64,\), .* got 5 \(int\)"),
        (lambda p: p.trajectory(IMAGES, [1, 2], INDEX), r"times must be a tensor of shape \(K,\), .* got \[1, 2\]"),
        (lambda p: p.trajectory(IMAGES, INDEX[1:3], INDEX[:5]), r"index must be a tensor of shape \(64,\)"),
        (lambda p: p.step(FLOATS, T, T, FLOATS), r"s must be less than t"),
        (lambda p: ForwardProcess(Rectified()).posterior(FLOATS, FLOATS, T / 10), r"posterior needs s="),
        (lambda p: p(IMAGES[:1, 0, 0, 0, None].expand(1, 2**32), INDEX[:1]), r"x_0 must be of fewer than 2\^32 elemen"),
    ],
)
def test_calls_that_are_refused_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(ForwardProcess(LinearBeta()))
