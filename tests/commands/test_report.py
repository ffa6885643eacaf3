"""The report: its figures against known ones, and that it prints for every schedule and recipe."""

import math

import pytest
import torch

from diffaug import ForwardProcess, LinearBeta, Rectified
from diffaug.__main__ import main
from diffaug.commands.report import facts
from diffaug.process.density import trained_on
from diffaug.schedules import Truncated
from diffaug.targets import MinSNR, SNRWeight


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


def test_pages_print(capsys):
    assert main(["report", "schedule=cosine", "weight=min_snr", "times=logit_normal"]) == 0
    out = capsys.readouterr().out
    assert "SNR is 1 at        t = 495.05" in out
    assert "4.38e-10 bits per dimension" in out
    assert "LogitNormal(" in out
    for experiment in ("edm", "rectified_flow", "zero_terminal_snr_v"):
        assert main(["report", f"experiment={experiment}"]) == 0
        assert "nan" not in capsys.readouterr().out


def test_the_table_has_every_schedule(capsys):
    assert main(["report", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert "nan" not in "".join(lines)
    assert any(line.startswith("linear ") and "7.28e-06 (at most 2.91e-05)" in line for line in lines)
