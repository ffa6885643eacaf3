"""Pictures by their numbers, which lie beside them as CSV; what a recipe trains on against closed forms; errors."""

import csv
import itertools
import math
from typing import Any

import pytest
import torch

from diffaug import (
    EDM,
    VPSDE,
    ContextParts,
    Discretised,
    ForwardProcess,
    LinearBeta,
    LogNormal,
    NoisyBatch,
    Pair,
    Parts,
    Rectified,
    ZeroTerminalSNR,
    plots,
)
from diffaug.__main__ import main
from diffaug.commands.plot import read_levels, write_label
from diffaug.plots.curves import LEVEL_COLUMNS
from diffaug.plots.images import whole_bins
from diffaug.plots.picture import new_figure, write_csv
from diffaug.process.density import density
from diffaug.targets import EDMWeight, MinSNR
from diffaug.times import ConstantDecrement

pytest.importorskip("matplotlib")
IMAGE = torch.linspace(-1, 1, 256).reshape(1, 16, 16)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(picture):
    return [dict(zip(picture.columns, row, strict=True)) for row in picture.rows]


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_saved_with_its_numbers_to_the_last_digit(ending, magic, tmp_path):
    picture = plots.Picture(new_figure(1, 1), ("t", "log_snr"), [(0.1 + 0.2, -math.inf), (3, "")])
    path = picture.save(tmp_path / "new" / f"a{ending}")
    assert path.read_bytes().startswith(magic)
    assert path.with_suffix(".csv").read_text() == "t,log_snr\n0.30000000000000004,-inf\n3,\n"
    again = picture.save(tmp_path / f"b{ending}")
    assert again.read_bytes() == path.read_bytes()
    plots.Picture(new_figure(1, 1)).save(tmp_path / f"c{ending}")
    assert not (tmp_path / "c.csv").exists()


def test_the_numbers_of_schedules_are_the_schedules():
    named = {"linear": LinearBeta(), "flow": Rectified(), "zero": ZeroTerminalSNR(LinearBeta(10))}
    rows = rows_of(plots.schedules(named))
    assert [sum(row["schedule"] == name for row in rows) for name in named] == [1000, 1001, 10]
    last = rows[999]
    assert last["alpha_bar"] == pytest.approx(4.035829765375676e-05, rel=1e-12)
    assert last["beta"] == pytest.approx(0.02)
    assert last["log_snr"] == pytest.approx(-10.11767, abs=1e-5)
    middle = rows[1500]
    assert (middle["t"], middle["beta"], middle["alpha"], middle["sigma"]) == (0.5, "", 0.5, 0.5)
    assert rows[-1]["log_snr"] == -math.inf


def test_the_legend_says_what_is_left_at_the_end():
    figure = plots.schedules({"a": LinearBeta(), "b": Rectified(), "c": EDM(sigma_max=0.5)}).figure
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == [
        "a\nSNR: 1 at t = 258.1, 4.04e-05 at the end",
        "b\nSNR: 1 at t = 0.5, 0 at the end",
        "c\nSNR: 4 at the end",
    ]


def test_alpha_and_sigma_have_a_panel_each():
    _, _, _, alpha, sigma, _ = plots.schedules({"a": LinearBeta(), "b": Rectified()}).figure.axes
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert [len(axes.lines) for axes in (alpha, sigma)] == [2, 2]
    assert alpha.lines[1].get_ydata() == pytest.approx((1 - t).numpy())
    assert sigma.lines[1].get_ydata() == pytest.approx(t.numpy())


def test_a_schedule_without_betas_is_named_where_they_are():
    def notes(**named):
        return [text.get_text() for text in plots.schedules(named).figure.axes[0].texts]

    assert notes(a=LinearBeta()) == []
    assert notes(a=LinearBeta(), b=Rectified(), c=VPSDE()) == ["b, c: no betas, continuous"]
    assert notes(a=LinearBeta(), b=Discretised(EDM())) == ["b: no betas, variance exploding"]
    assert notes(b=Rectified()) == ["no betas:\ncontinuous"]


def test_a_density_is_the_one_the_paper_states():
    edges = torch.linspace(-12, 12, 241, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    # EDM: ln sigma ~ N(-1.2, 1.2^2), so log-SNR = -2 ln sigma ~ N(2.4, 2.4^2); its weight is 1 on the loss of F.
    process = ForwardProcess(EDM(), LogNormal(), weight=EDMWeight(), target="F")
    draws, load = density(process, edges)
    normal = torch.distributions.Normal(2.4, 2.4).log_prob(middle.float()).exp().double() * 0.1
    torch.testing.assert_close(draws, normal, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(load, draws / draws.sum(), rtol=2e-3, atol=1e-5)
    # Rectified: uniform u, log-SNR = 2 logit(1 - u): logistic of scale 2.
    draws, load = density(ForwardProcess(Rectified(), target="flow"), edges, loss="flow")
    ends = (edges / 2).sigmoid()
    torch.testing.assert_close(draws, ends.diff(), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(load, ends.diff(), rtol=2e-3, atol=1e-6)


def test_a_weight_means_the_same_on_every_loss():
    edges = torch.linspace(-9, 9, 37, dtype=torch.float64)
    same = [
        density(ForwardProcess(LinearBeta(), target=target, weight=MinSNR()), edges)[1]
        for target in ("epsilon", "v", "x_0")
    ]
    torch.testing.assert_close(same[0], same[1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(same[0], same[2], rtol=1e-5, atol=1e-9)
    plain = density(ForwardProcess(LinearBeta()), edges, loss="epsilon")
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-9, atol=0)
    assert plain[0].sum() == pytest.approx(1, abs=0.06)  # some of it beyond -9
    assert not torch.allclose(same[0], plain[1], rtol=0.1)


def test_recipes_are_densities():
    named = {"ddpm": ForwardProcess(LinearBeta()), "zero": ForwardProcess(ZeroTerminalSNR(LinearBeta()), target="v")}
    rows = rows_of(plots.recipes(named))
    for name in named:
        own = [row for row in rows if row["recipe"] == name]
        for column in ("draws_per_nat", "draws_times_weight"):
            area = sum(row[column] * (row["log_snr_high"] - row["log_snr_low"]) for row in own)
            # Some of the last steps of the second lie beyond 14 nats.
            assert area == pytest.approx(1, abs=0.02 if name == "zero" else 1e-6)


def test_a_recipe_ends_where_its_schedule_does():
    """Upright and not at a slant: to halfway beyond the last level; of uniform timesteps, 1 / (T d log-SNR / dt)."""
    (rows,) = [plots.recipes({"ddpm": ForwardProcess(LinearBeta())}).rows]
    levels = LinearBeta().log_snr(torch.tensor([0, 1, 998, 999]), torch.float64).tolist()
    assert rows[0][1] == pytest.approx(levels[3] - (levels[2] - levels[3]) / 2)
    assert rows[-1][2] == pytest.approx(levels[0] + (levels[0] - levels[1]) / 2)
    assert rows[0][3] == pytest.approx(1 / (1000 * (levels[2] - levels[3])), rel=0.01)
    line = plots.recipes({"ddpm": ForwardProcess(LinearBeta())}).figure.axes[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert (x[0], y[0], x[1]) == (x[1], 0, rows[0][1])
    assert y[1] == rows[0][3]


def test_a_recipe_of_few_timesteps_a_nat_does_not_wobble():
    """The densities of 1,000 linear steps fall without a dent toward the least noise, where a step is 0.8 nats."""
    rows = [row for row in plots.recipes({"ddpm": ForwardProcess(LinearBeta())}).rows if row[1] > 3]
    for column in (3, 4):
        height = [row[column] for row in rows]
        steps = [b - a for a, b in itertools.pairwise(height)]
        assert max(steps) < 0.002 * max(height)
        assert max(abs(b - a) for a, b in itertools.pairwise(steps)) < 0.02 * max(height)


def test_a_strip_has_the_levels_of_its_schedules_and_the_same_noise():
    picture = plots.strip({"linear": LinearBeta(), "vp": VPSDE()}, IMAGE, sizes=[4, 16], columns=5)
    rows = rows_of(picture)
    assert len(rows) == 2 * 2 * 4
    assert {row["size"] for row in rows} == {4, 16}
    assert rows[3]["log_snr"] == pytest.approx(-10.11767, abs=1e-5)
    shown = [axes.images[0].get_array() for axes in picture.figure.axes]
    assert [image.shape for image in shown[::5]] == [(4, 4), (4, 4), (16, 16), (16, 16)]
    coarse = IMAGE.reshape(4, 4, 4, 4).mean((1, 3))  # averaged over squares
    torch.testing.assert_close(torch.tensor(shown[0]), (coarse + 1) / 2, rtol=1e-5, atol=1e-6)
    said = [axes.get_xlabel() for axes in picture.figure.axes]
    assert (said[0], said[1], said[4]) == ("", f"log-SNR {rows[0]['log_snr']:.1f}", "log-SNR -10.1")
    # At the end both schedules are all noise, and it is the same.
    torch.testing.assert_close(torch.tensor(shown[4]), torch.tensor(shown[9]), rtol=0, atol=0.01)
    assert shown[4].std() > 0.2


def test_a_batch_shows_the_clean_images_it_was_made_of():
    process = ForwardProcess(LinearBeta(), fields=("x_t", "v", "t"), target="v")
    images = torch.stack([IMAGE, -IMAGE])
    picture = plots.batch(process, process(images, torch.arange(2)))
    shown = [torch.tensor(axes.images[0].get_array()) for axes in picture.figure.axes]
    torch.testing.assert_close(torch.stack(shown[2:]), (images[:, 0] + 1) / 2, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"wants its fields x_t, t and a target, but it has \['x_t', 't'\]"):
        plots.batch(process, ForwardProcess(LinearBeta(), fields=("x_t", "t"))(images, torch.arange(2)))


def test_a_batch_shows_the_states_of_a_pair_at_their_times():
    pair = Pair(ConstantDecrement(4, group=2))
    fields = ("x_t", "flow", "t", "x_s", "s", "x_r", "r")
    process, index = ForwardProcess(Rectified(), fields=fields, pair=pair), torch.arange(2)
    batch: Any = process(torch.stack([IMAGE, -IMAGE]), index, position=index)
    picture = plots.batch(process, batch)
    assert picture.columns == ("t", "alpha", "sigma", "log_snr", "r", "s")
    labels = [axes.get_ylabel() for axes in picture.figure.axes[::2]]
    assert labels == ["$x_t$", "$x_r$", "$x_s$", "$x_0$"]
    shown = [torch.tensor(axes.images[0].get_array()) for axes in picture.figure.axes]
    for state, column in ((batch.x_r, 2), (batch.x_s, 4)):
        expected = (state[:, 0].clamp(-1, 1) + 1) / 2
        torch.testing.assert_close(torch.stack(shown[column : column + 2]), expected, rtol=0, atol=1e-4)
    assert picture.figure.axes[0].get_title().split("\n")[2:] == [f"r = {batch.r[0]:.3g}", f"s = {batch.s[0]:.3g}"]
    clean = ForwardProcess(LinearBeta(1), fields=("x_t", "v", "t", "x_s", "s"), target="v", pair=Pair())  # s is -1
    plots.batch(clean, clean(torch.stack([IMAGE, -IMAGE]), index))


def test_a_signal_to_noise_ratio_is_written_without_a_power_of_ten():
    process, images = ForwardProcess(LinearBeta()), IMAGE[None].expand(3, -1, -1, -1)
    figure = plots.batch(process, NoisyBatch(images, images, torch.tensor([0, 258, 500]))).figure
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["t = 0\nSNR 9999", "t = 258\nSNR 1", "t = 500\nSNR 0.084"]


def test_a_preview_leaves_room_for_its_legend():
    process, t = ForwardProcess(LinearBeta()), torch.arange(1000)  # as even as can be: bars of height 1
    last = plots.preview(process, IMAGE[None], t, IMAGE).figure.axes[-1]
    assert last.get_ylim() == (0, pytest.approx(1.2))


def test_forward_and_progress_show_what_they_are_given():
    picture = plots.forward(ForwardProcess(LinearBeta()), IMAGE[None], columns=5)
    assert [row[0] for row in picture.rows] == [250, 500, 750, 999]
    taken = [(step, torch.full((2, 1, 4, 4), step / 100)) for step in range(0, 100, 5)]
    figure = plots.progress(taken, rows=3).figure
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["step 0", "step 50", "step 95"]
    assert figure.axes[-1].images[0].get_array()[0, 0] == pytest.approx((0.95 + 1) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: plots.samples(IMAGE[None]).save(path / "a.jpg"), r"out must be a file that ends in \.png, \.svg"),
        (lambda path: plots.schedules({}), r"at least one schedule"),
        (lambda path: plots.recipes({}), r"at least one recipe"),
        (lambda path: plots.levels([]), r"no row was reported"),
        (lambda path: plots.progress([]), r"none were taken"),
        (lambda path: plots.strip({"a": LinearBeta()}, IMAGE, sizes=[32]), r"sizes must be from 1 to 16.*\[32\]"),
    ],
)
def test_what_cannot_be_drawn_is_said(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_parts_are_drawn_at_their_own_levels():
    clip = torch.linspace(-1, 1, 5 * 64).reshape(1, 1, 5, 8, 8)  # (B, C, F, H, W)
    fields = ("x_t", "x_0", "t", "log_snr")
    named = {
        "each": ForwardProcess(Rectified(), parts=Parts(2), fields=fields),
        "given": ForwardProcess(Rectified(), parts=Parts(2, law=ContextParts(2)), fields=fields),
    }
    picture = plots.parts(named, clip)
    rows = rows_of(picture)
    assert [row["law"] for row in rows] == ["each"] * 5 + ["given"] * 5
    assert [row["t"] for row in rows[5:7]] == [0, 0]
    assert [row["t"] for row in rows[7:]] == [row["t"] for row in rows[2:5]]
    said = [axes.get_xlabel() for axes in picture.figure.axes]
    assert said[:5] == [""] * 5  # x_0
    assert said[5] == f"t = {rows[0]['t']:.3g}"
    assert said[10:12] == ["clean", "clean"]
    patches = ForwardProcess(Rectified(), parts=Parts([-2, -1], 4), fields=fields)
    assert len(plots.parts({"patches": patches}, IMAGE.expand(3, 1, 16, 16)).figure.axes) == 6
    with pytest.raises(ValueError, match=r"plot parts wants process\.parts.*but none has None"):
        plots.parts({"none": ForwardProcess(Rectified(), fields=fields)}, clip)


@pytest.mark.slow
def test_the_command_line_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: False)  # it takes seconds

    def plot(*arguments):
        assert main(["plot", *arguments]) == 0

    plot("schedules", "linear", "cosine,schedule.timesteps=50", f"out={tmp_path / 'a.png'}")
    assert len(read(tmp_path / "a.csv")) == 1050
    assert {row["schedule"] for row in read(tmp_path / "a.csv")} == {"linear", "cosine, T = 50"}
    plot("recipes", "ddpm", "edm", f"out={tmp_path / 'b.svg'}")
    assert {row["recipe"] for row in read(tmp_path / "b.csv")} == {"ddpm", "edm"}
    plot("strip", "linear", "sizes=[4,8]", f"out={tmp_path / 'c.png'}")
    assert {row["size"] for row in read(tmp_path / "c.csv")} == {"4", "8"}
    plot(
        "parts",
        "shared",
        "context,process.parts.law.count=3",
        "experiment=diffusion_forcing",
        f"out={tmp_path / 'e.png'}",
    )
    assert {row["law"] for row in read(tmp_path / "e.csv")} == {"shared", "context, count = 3"}
    assert str(tmp_path / "c.png") in capsys.readouterr().out
    assert main(["plot", "schedules", f"out={tmp_path / 'd.png'}"]) == 1
    assert "wants at least one name" in capsys.readouterr().err
    write_csv(
        tmp_path / "loss_by_level.csv", LEVEL_COLUMNS, [("val", 1, 0, 0.0, math.inf, 3, 0.9, 0.2, 0.8, "log_snr")]
    )
    plot("levels", str(tmp_path), f"out={tmp_path / 'f.png'}")
    assert (tmp_path / "f.csv").read_bytes() == (tmp_path / "loss_by_level.csv").read_bytes()
    (tmp_path / "loss_by_level.csv").unlink()
    assert main(["plot", "levels", str(tmp_path)]) == 1
    assert "train with callbacks=loss_by_level" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "group", "words"),
    [
        ("linear", "schedule", "linear"),
        ("cosine,schedule.timesteps=4000", "schedule", "cosine, T = 4000"),
        ("zero_terminal_snr,schedule@schedule.base=cosine", "schedule", "zero_terminal_snr, base = cosine"),
        (
            "shifted,schedule.factor=2,schedule.base.timesteps=10",
            "schedule",
            "shifted, factor = 2, base.timesteps = 10",
        ),
        ("edm,times.mean=-0.4,weight=none", "experiment", "edm, times.mean = -0.4, weight = none"),
    ],
)
def test_a_name_with_overrides_as_a_legend_says_it(name, group, words):
    assert write_label(name, group) == words


def test_a_bin_of_one_image_has_no_spread():
    rows = [
        ("val", 10, 0, -2.0, 0.0, 5, 0.5, 0.1, 0.4, "log_snr"),
        ("val", 10, 0, 2.0, 4.0, 1, 0.9, 0.0, 0.8, "log_snr"),
    ]
    above, below = plots.levels(rows).figure.axes
    (bars,) = above.containers
    assert [[end.tolist() for end in bar] for bar in bars[2][0].get_segments()] == [[[-1, 0.4], [-1, 0.6]]]
    (open_dots,) = [line for line in above.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert (open_dots.get_xdata(), open_dots.get_ydata()) == ([3], [0.9])
    assert "one image" in [text.get_text() for text in above.get_legend().get_texts()]
    assert below.get_xticks().tolist() == [-2, 0, 2, 4]


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        (torch.arange(256) / 127.5 - 1, 64),  # four values of an 8-bit image to a bin
        (torch.arange(17) / 8 - 1, 17),
        (torch.arange(100).add(0.5) / 50 - 1, 50),
        (torch.linspace(-1, 1, 64 * 1000 + 1)[:-1] + 1e-5, 64),
    ],
)
def test_a_histogram_of_whole_values_is_no_comb(values, bins):
    edges = whole_bins(values.float().double(), -1.0, 1.0, 64)
    assert len(edges) == bins + 1
    assert (edges[0], edges[-1]) == pytest.approx((-1, 1), abs=0.07)
    density, _ = torch.histogram(values.float().double(), edges, density=True)
    assert density.max() / density.min() == pytest.approx(1, abs=0.01)


def test_a_csv_of_levels_is_drawn_again(tmp_path):
    rows = [
        ("val", 10, 0, -math.inf, 0.0, 5, 0.5, 0.1, 0.4, "log_snr"),
        ("val", 10, 0, 0.0, math.inf, 3, 0.9, 0.2, 0.8, "log_snr"),
    ]
    write_csv(tmp_path / "loss_by_level.csv", LEVEL_COLUMNS, rows)
    assert plots.levels(read_levels(str(tmp_path))).rows == rows
