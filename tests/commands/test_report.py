"""The report: its figures against known ones, and that it prints for every schedule and recipe."""

import math
import re

import pytest
import torch

from diffaug import (
    EDM,
    EDMWeight,
    ForwardProcess,
    FusedSNR,
    LinearBeta,
    LogitNormal,
    LogNormal,
    Pair,
    Parts,
    Rectified,
    ScaledLinearBeta,
    ZeroTerminalSNR,
)
from diffaug.__main__ import main
from diffaug.commands.report import facts, page
from diffaug.process.density import density, even_times, trained_on
from diffaug.schedules import Truncated
from diffaug.targets import MinSNR, SNRWeight
from diffaug.times import ConstantDecrement, DyadicStep, TwoDraws


def test_facts_of_the_linear_schedule():
    known = facts(LinearBeta())
    assert known.times == "T = 1000"
    assert known.log_snr == pytest.approx((9.21024, -10.11767), abs=1e-5)
    assert known.crossing == pytest.approx(258.59301969495516 / 1000, rel=1e-9)
    assert known.noise_share == 0.046  # 46 steps have alpha_bar < 1e-4; SNR < 1e-4 at the same ones
    assert known.prior_kl[1] == pytest.approx(2.911294542030792e-05, rel=1e-9)


def test_a_schedule_may_never_cross():
    assert facts(Truncated(LinearBeta(), 0, 100)).crossing is None


def test_what_a_recipe_trains_on_by_quadrature():
    edges = torch.tensor([-math.inf, 0.0, math.inf], dtype=torch.float64)
    draws, load = trained_on(ForwardProcess(LinearBeta()), edges)
    assert draws.tolist() == pytest.approx([0.741, 0.259], abs=1e-3)  # SNR >= 1 at t = 0 .. 258
    assert torch.equal(draws, load)
    # Rectified, uniform u, SNR on epsilon's loss: the weight is ((1 - u) / u)^2 clipped at gamma.
    process = ForwardProcess(Rectified(), weight=MinSNR(gamma=1.0), target="x_0")
    _, load = trained_on(process, edges)
    noisy = 2 * (1 - math.log(2)) - 0.5  # the integral of ((1 - u) / u)^2 from 1/2 to 1 is 3/2 - 2 ln 2
    assert noisy == pytest.approx(1.5 - 2 * math.log(2))
    assert load.tolist() == pytest.approx([noisy / (noisy + 0.5), 0.5 / (noisy + 0.5)], rel=1e-3)
    assert isinstance(ForwardProcess(LinearBeta(), weight=SNRWeight()), ForwardProcess)


def test_a_page_is_printed(capsys):
    assert main(["report", "schedule=cosine", "weight=min_snr", "times=logit_normal"]) == 0
    out = capsys.readouterr().out
    assert "SNR is 1 at        t = 495.05" in out
    assert "4.38e-10 bits per dimension" in out
    assert "LogitNormal(" in out


@pytest.mark.parametrize(
    "process",
    [
        ForwardProcess(EDM(), LogNormal(), weight=EDMWeight(), target="F"),
        ForwardProcess(Rectified(), LogitNormal(), target="flow"),
        ForwardProcess(ZeroTerminalSNR(ScaledLinearBeta()), target="v"),
    ],
)
def test_a_page_has_no_nan(process):
    assert "nan" not in page(process)


def test_the_table_has_every_schedule(capsys):
    assert main(["report", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert "nan" not in "".join(lines)
    assert any(line.startswith("linear ") and "7.28e-06 (at most 2.91e-05)" in line for line in lines)


@pytest.mark.parametrize(
    ("process", "noisier"),
    [
        # t is the greater of two draws: P(t > 1/2) = 1 - P(a draw is below)^2.
        (ForwardProcess(Rectified(), LogitNormal(-0.4), fields=("x_t", "s"), pair=Pair(TwoDraws())), 1 - 0.655422**2),
        # t is the upper end of a cell of 2^-k: P(t > 1/2) of k = 0 is 1, of a finer one 1/2.
        (
            ForwardProcess(Rectified(), fields=("x_t", "s"), pair=Pair(DyadicStep(levels=4, equal=0.5))),
            0.5 + 0.5 * (1 / 4) / 2,
        ),
        # A group's t has the density of the process's own.
        (ForwardProcess(Rectified(), fields=("x_t", "r"), pair=Pair(ConstantDecrement())), 0.5),
        (ForwardProcess(Rectified(), LogitNormal(-0.4), fields=("x_t", "s"), pair=Pair()), 1 - 0.655422),
    ],
)
def test_what_is_trained_on_is_the_t_that_a_pair_makes(process, noisier):
    low = torch.tensor([-math.inf, -1e-9], dtype=torch.float64)  # t = 1/2 itself is not counted
    assert trained_on(process, low)[0].item() == pytest.approx(noisier, abs=0.006)
    fine = torch.linspace(-40, -1e-9, 200, dtype=torch.float64)
    finite = process.schedule.log_snr(even_times(process, 2**16), torch.float64).isfinite().double().mean().item()
    if finite == 1:
        assert density(process, fine)[0].sum().item() == pytest.approx(noisier, abs=0.006)


def test_a_page_says_its_pair_its_parts_and_what_the_table_leaves_out():
    out = page(ForwardProcess(Rectified(), fields=("x_t", "s"), pair=Pair(TwoDraws())))
    assert re.search(r"\n  pair    Pair\(times=TwoDraws\(.*; the table is of the t that it makes, a curriculum", out)
    out = page(ForwardProcess(LinearBeta(), parts=Parts(1), weight=FusedSNR()))
    assert re.search(r"\n  parts   Parts\(.*; the table is of the parts that draw a t\n", out)
    assert re.search(r"\n  weight  FusedSNR\(.*\n +as if each frame were alone: what the frames before say is", out)
    assert not re.search(r"  (pair|parts) |alone", page(ForwardProcess(LinearBeta())))
