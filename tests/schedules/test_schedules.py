"""The laws of every schedule: each file in configs/schedule is made through Hydra and held to them.

A new schedule is found by its file; nothing here changes.
"""

import dataclasses
import math
import textwrap

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from shared import SCHEDULES, composed, schedule_of, times

from diffaug import schedules
from diffaug.checks import bounded
from diffaug.schedules.numbers import hypot, keep, power, sigmoid


def test_coefficients_are_finite_and_never_nan(schedule):
    t = times(schedule)
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = schedule.alpha_sigma(t, dtype)
        log_snr = schedule.log_snr(t, dtype)
        assert alpha.dtype == sigma.dtype == log_snr.dtype == dtype
        assert bool(alpha.isfinite().all())
        assert bool(sigma.isfinite().all())
        assert bool((alpha >= 0).all())
        assert bool((sigma >= 0).all())
        assert not bool(log_snr.isnan().any())
        assert bool((sigma[log_snr == math.inf] == 0).all())
        assert bool((alpha[log_snr == -math.inf] == 0).all())


def test_log_snr_never_rises(schedule):
    log_snr = schedule.log_snr(times(schedule), torch.float64)
    assert bool((log_snr[1:] <= log_snr[:-1]).all())
    assert log_snr[0] > log_snr[-1]


def test_log_snr_is_that_of_alpha_and_sigma(schedule):
    t = times(schedule)
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    log_snr = schedule.log_snr(t, torch.float64)
    torch.testing.assert_close(2 * (alpha.log() - sigma.log()), log_snr, rtol=1e-12, atol=1e-12)


def test_scaling(schedule):
    alpha, sigma = schedule.alpha_sigma(times(schedule), torch.float64)
    identity = {
        "variance preserving": alpha**2 + sigma**2,
        "variance exploding": alpha,
        "straight": alpha + sigma,
        "sub-variance preserving": alpha**2 + sigma,
        "straight from a least noise": alpha * (1 - getattr(schedule, "sigma_min", 0)) + sigma,
    }[schedule.scaling.name]
    torch.testing.assert_close(identity, torch.ones_like(identity), rtol=1e-14, atol=0)


def test_shape_dtype_and_device_follow_t(schedule, device):
    t = times(schedule)[:6].reshape(2, 3, 1).to(device)
    for value in (schedule.log_snr(t), *schedule.alpha_sigma(t), schedule.to_unit(t)):
        assert (value.shape, value.dtype, value.device.type) == (t.shape, torch.float32, device.type)
    empty = schedule.log_snr(t[:0])
    assert empty.shape == (0, 3, 1)
    u = torch.rand(2, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    native = schedule.from_unit(u)
    assert (native.shape, native.device.type) == (u.shape, device.type)
    assert native.dtype == (torch.int64 if schedule.discrete else torch.float64)
    assert schedule.t_of_log_snr(schedule.log_snr(t)).shape == t.shape


@pytest.mark.parametrize(
    ("function", "count"),
    [(sigmoid, 1), (hypot, 2), (lambda x: power(x, 7.0), 1), (lambda x: power(x, -0.3), 1)],
    ids=["sigmoid", "hypot", "power", "root"],
)
def test_a_number_does_not_depend_on_its_place(function, count):
    """In pieces that fill no vector, and shared out among threads, each has the bits that it has alone."""
    numbers = torch.rand(count, 40_007, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    whole = function(*numbers)
    for size in (1, 7, 13):
        some = numbers[:, :2002]
        assert torch.equal(torch.cat([function(*piece) for piece in some.split(size, 1)]), whole[:2002])
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert torch.equal(function(*numbers), whole)
    finally:
        torch.set_num_threads(threads)
    shaped = numbers[:, :24].view(count, 2, 3, 4)
    assert torch.equal(function(*shaped).flatten(), whole[:24])


def test_a_coefficient_does_not_depend_on_its_place(schedule):
    """Pieces of a size that fills no vector of the CPU have the bits of the whole."""
    t = times(schedule, points=2001)
    t = t[: len(t) // 16 * 16]
    whole = torch.stack([schedule.log_snr(t), *schedule.alpha_sigma(t)])
    pieces = [torch.stack([schedule.log_snr(some), *schedule.alpha_sigma(some)]) for some in t.split(15)]
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_from_unit_is_monotone_and_even(schedule):
    count = schedule.timesteps if schedule.discrete else 1
    u = (torch.arange(count * 8, dtype=torch.float64) + 0.5) / (count * 8)
    t = schedule.from_unit(u)
    assert bool((t[1:] >= t[:-1]).all())
    low, high = schedule.ends
    assert schedule.from_unit(torch.tensor([0.0, 1.0])).tolist() == [low.item(), high.item()]
    schedule.log_snr(torch.stack([low, high]) if schedule.discrete else torch.stack([low, high]).float())  # legal
    if schedule.discrete:
        assert (low.item(), high.item()) == (0, schedule.timesteps - 1) == schedule.range
        assert t.bincount().tolist() == [8] * schedule.timesteps
    else:
        assert bool((t[1:] > t[:-1]).all())


def test_unit_time_round_trips(schedule):
    low, high = schedule.ends
    t = times(schedule)
    t = t[(t.double() >= low) & (t.double() <= high)]
    unit = schedule.to_unit(t, torch.float64)
    assert bool((unit >= 0).all())
    assert bool((unit <= 1).all())
    back = schedule.from_unit(unit)
    if schedule.discrete:
        assert torch.equal(back, t)
    else:
        torch.testing.assert_close(back, t.double(), rtol=1e-9, atol=1e-15)


def test_log_snr_round_trips(schedule):
    t = times(schedule)
    log_snr = schedule.log_snr(t, torch.float64)
    back = schedule.t_of_log_snr(log_snr)
    assert back.dtype == torch.float64
    if schedule.discrete:
        first = torch.searchsorted(-log_snr, -log_snr)  # the lowest t of those with this log-SNR
        torch.testing.assert_close(back, first.double(), rtol=0, atol=1e-9)
        between = (log_snr[1:] + log_snr[:-1]) / 2
        inside = (between < log_snr[:-1]) & between.isfinite()
        torch.testing.assert_close(
            schedule.t_of_log_snr(between)[inside], t[:-1][inside].double() + 0.5, rtol=0, atol=1e-6
        )
    else:
        # Where t is flat in floating point (near an end) the log-SNR is what must come back.
        again = schedule.compute_log_snr(back)
        ends = schedule.range
        ordinary = (log_snr.abs() < 20) & (t.double() >= ends[0]) & (t.double() <= ends[1])
        torch.testing.assert_close(again[ordinary], log_snr[ordinary], rtol=1e-9, atol=1e-9)
        assert bool(ordinary.sum() > len(t) / 2)
    beyond = schedule.t_of_log_snr(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    assert beyond.tolist() == pytest.approx([t[0].item(), t[-1].item()], abs=1e-7)


def test_tables(schedule):
    if not schedule.discrete or schedule.scaling is not schedules.base.VARIANCE_PRESERVING:
        for name in ("betas", "alphas", "alpha_bars"):
            with pytest.raises(
                TypeError, match=f"discrete, variance preserving schedule has {name.replace('alphas', 'betas')}"
            ):
                getattr(schedule, name)
        return
    betas, alphas, alpha_bars = schedule.betas, schedule.alphas, schedule.alpha_bars
    assert all(x.shape == (schedule.timesteps,) and x.dtype == torch.float64 for x in (betas, alphas, alpha_bars))
    assert bool((betas >= 0).all())
    assert bool((betas <= 1).all())
    assert torch.equal(alphas, 1 - betas)
    torch.testing.assert_close(alphas.cumprod(0), alpha_bars, rtol=1e-12, atol=0)
    alpha, sigma = schedule.alpha_sigma(torch.arange(schedule.timesteps), torch.float64)
    torch.testing.assert_close(alpha**2, alpha_bars, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bars, rtol=1e-12, atol=1e-15)
    betas.zero_()
    assert schedule.betas.sum() > 0  # what is handed out is a copy


def test_a_time_out_of_range_or_of_the_wrong_kind_is_refused(schedule):
    low, high = schedule.range
    kind = torch.int64 if schedule.discrete else torch.float64
    beyond = high + 1 if high < 1e30 else math.inf
    for t in (torch.tensor([low - 1]), torch.tensor([beyond])):
        for method in (schedule.log_snr, schedule.alpha_sigma):
            with pytest.raises(ValueError, match=f"{type(schedule).__name__} wants t as"):
                method(t.to(kind))
    with pytest.raises(ValueError, match="wants t as"):
        schedule.log_snr(torch.tensor([0.5]) if schedule.discrete else torch.tensor([1]))
    if not schedule.discrete:
        with pytest.raises(ValueError, match="wants t as float"):
            schedule.log_snr(torch.tensor([math.nan]))


def test_a_table_is_made_outside_of_the_mode_and_device_that_its_first_user_is_in():
    """Lightning validates first, in inference mode: a tensor of that would break a later training."""

    @keep
    def make(count: int) -> torch.Tensor:
        return torch.ones(count)

    with torch.inference_mode(), torch.device("meta"):
        made = make(3)
    assert (made.is_inference(), made.device.type) == (False, "cpu")
    assert make(3) is made


# Composition, as a user writes it.


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEDULES if isinstance(schedule_of(name), schedules.Wrapper)])
def test_a_wrapper_takes_any_base_that_fits_it_on_the_command_line(name):
    key = "schedule.base.base" if isinstance(schedule_of(name).base, schedules.Wrapper) else "schedule.base"
    fitted = 0
    for base in ("cosine", "rectified"):
        config = composed(f"schedule={name}", f"schedule@{key}={base}", config="train")
        try:
            wrapped = instantiate(config.schedule)
        except InstantiationException as error:
            if "ValueError('schedule." not in str(error):
                raise
            continue
        fitted += 1
        inner = wrapped.base.base if key.endswith("base.base") else wrapped.base
        assert inner == schedule_of(base)
        assert type(wrapped) is type(schedule_of(name))
    assert fitted


def test_wrappers_nest_on_the_command_line():
    config = composed(
        "schedule=zero_terminal_snr",
        "schedule@schedule.base=shifted",
        "schedule@schedule.base.base=cosine",
        "schedule.base.factor=2",
        "schedule.base.base.timesteps=400",
        config="train",
    )
    wanted = schedules.ZeroTerminalSNR(schedules.Shifted(schedules.Cosine(400), factor=2.0, image=8))
    assert instantiate(config.schedule) == wanted


def test_lists_and_files_on_the_command_line(tmp_path):
    config = composed("schedule=respaced", "schedule.steps=[10,15,20]", "schedule.spacing=linspace", config="train")
    assert instantiate(config.schedule) == schedules.Respaced(schedules.LinearBeta(), (10, 15, 20), "linspace")
    (tmp_path / "mine.csv").write_text("0.1\n0.2\n")
    config = composed("schedule=tabulated", f"schedule.values={tmp_path}/mine.csv", config="train")
    assert instantiate(config.schedule) == schedules.Tabulated((0.1, 0.2))


@pytest.mark.parametrize("wrapper", [schedules.ZeroTerminalSNR, schedules.Respaced])
def test_a_discrete_wrapper_on_a_continuous_schedule_says_what_to_do(wrapper):
    with pytest.raises(ValueError, match=r"schedule\.base must be a discrete.*schedule@schedule\.base=discretised"):
        wrapper(schedules.VPSDE())
    wrapper(schedules.Discretised(schedules.VPSDE()))


def test_other_bases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="variance preserving"):
        schedules.ZeroTerminalSNR(schedules.Discretised(schedules.Rectified()))
    with pytest.raises(ValueError, match=r"schedule\.base must be a continuous schedule.*Respaced"):
        schedules.Discretised(schedules.Cosine())
    with pytest.raises(ValueError, match="less signal at its last step"):
        schedules.ZeroTerminalSNR(schedules.LinearBeta(1))
    with pytest.raises(ValueError, match=r"schedule\.factor.*schedule\.image"):
        schedules.Shifted(schedules.Cosine())
    with pytest.raises(ValueError, match=r"schedule\.base_image_most_noise.*would rise"):
        schedules.InterpolatedShift(schedules.LinearLogSNR(3.0, -3.0), 512, 8, 256)
    with pytest.raises(ValueError, match=r"schedule\.low must be a whole number in \[0, 999\]"):
        schedules.Truncated(schedules.Cosine(), low=0.5)
    with pytest.raises(ValueError, match=r"schedule\.low must be less than schedule\.high, 0\.2"):
        schedules.Truncated(schedules.VPSDE(), low=0.3, high=0.2)


def test_a_rescaled_linear_schedule_needs_more_than_20_steps():
    assert schedules.LinearBeta(21, rescale=True).betas.max() < 1
    with pytest.raises(ValueError, match=r"schedule\.timesteps must be > 20 where schedule\.rescale.*got 20"):
        schedules.LinearBeta(20, rescale=True)


# Tables of one's own.


@pytest.mark.parametrize("key", ["betas", "alpha_bars"])
@pytest.mark.parametrize("kind", ["npy", "npz", "npz of one", "csv", "csv without names", "csv of one name"])
def test_a_table_is_read_from_a_file(tmp_path, key, kind):
    import numpy as np

    cosine = schedules.Cosine(20)
    values = getattr(cosine, key).numpy()
    path = tmp_path / f"table.{kind.split()[0]}"
    if kind == "npy":
        np.save(path, values)
    elif kind.startswith("npz"):
        np.savez(path, **({key: values, "other": values[:3]} if kind == "npz" else {"noise": values}))
    elif kind == "csv":
        path.write_text(f"t, {key}\n" + "".join(f"{t}, {float(v)!r}\n" for t, v in enumerate(values)))
    else:
        name = "noise\n" if "name" in kind and "without" not in kind else ""
        path.write_text(name + "".join(f"{float(v)!r}\n" for v in values))
    read = schedules.Tabulated(path, key)
    assert read == schedules.Tabulated(tuple(values.tolist()), key) == schedules.Tabulated(str(path), key)
    assert hash(read) == hash(schedules.Tabulated(values, key))
    assert read != schedules.Tabulated(tuple(values[:-1].tolist()), key)
    torch.testing.assert_close(read.alpha_bars, cosine.alpha_bars, rtol=1e-12, atol=0)
    torch.testing.assert_close(read.betas, cosine.betas, rtol=1e-9, atol=1e-15)
    path.unlink()
    assert read.log_snr(torch.arange(20)).isfinite().all()  # it holds the numbers, not the file
    made_on_command_line = composed("+schedule=tabulated", f"schedule.key={key}", "schedule.values=[0.5,0.25]")
    assert instantiate(made_on_command_line.schedule).timesteps == 2


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ([0.1, 1.0, 0.1], "betas", r"schedule\.values\[1\] must be in \(0, 1\).*only the last may be 1"),
        ([0.0, 0.1], "betas", r"values\[0\] must be in \(0, 1\)"),
        ([0.9, 0.95], "alpha_bars", r"values\[1\] must be in \(0, 0\.9\], as alpha_bars never rise"),
        ([1.0, 0.5], "alpha_bars", r"values\[0\] must be in \(0, 1\)"),
        ([0.9, 0.0, 0.0], "alpha_bars", r"values\[1\].*only the last may be 0"),
        (torch.tensor([[0.1, 0.5]]), "betas", r"values\[0\] must be a finite number in \(0, 1\), but got \[0\.1"),
        (
            torch.tensor(0.5),
            "betas",
            r"schedule\.values must be a list of numbers .* but got 0\.5 \(float\)",
        ),
    ],
)
def test_tables_that_are_no_schedule_are_refused(values, key, message):
    with pytest.raises(ValueError, match=message):
        schedules.Tabulated(values, key)


def test_a_table_may_end_in_pure_noise():
    for table in (schedules.Tabulated((0.5, 1.0)), schedules.Tabulated((0.5, 0.0), "alpha_bars")):
        alpha, sigma = table.alpha_sigma(torch.arange(2))
        assert (alpha[1].item(), sigma[1].item()) == (0.0, 1.0)
        assert table.betas[1] == 1


def test_files_that_hold_no_table_are_refused(tmp_path):
    import numpy as np

    with pytest.raises(ValueError, match=r"schedule\.values must be .*there is no such file from .*got 'nowhere\.npy'"):
        schedules.Tabulated("nowhere.npy")
    for name in ("a.txt", "b.npy", "c.npz", "d.csv", "e.csv", "f.csv", "h.npy"):
        (tmp_path / name).write_text("")
    np.save(tmp_path / "b.npy", np.ones((2, 2)))
    np.savez(tmp_path / "c.npz", one=np.ones(2), two=np.ones(2))
    np.savez(tmp_path / "g.npz", alpha_bars=np.ones(2))
    (tmp_path / "d.csv").write_text("0.1,0.2\n0.3,0.4\n")
    (tmp_path / "f.csv").write_text("betas\n0.1\nx\n")
    for name, message in {
        "a.txt": r"the path of a \.npy, \.npz or \.csv file",
        "b.npy": r"one row of numbers",
        "c.npz": r"schedule\.values must be a file with one row of numbers, called betas; it has one, two, but got",
        "d.csv": r"one row of numbers, called betas; it has column 1, column 2, but",
        "e.csv": r"one row of numbers, called betas; it has none, but",
        "g.npz": r"one row of numbers, called betas; it has alpha_bars, but",
        "h.npy": r"schedule\.values must be the path of a whole \.npy file",
        "f.csv": r"schedule\.values\[1\] must be a finite number in \(0, 1\), but got 'x'",
    }.items():
        with pytest.raises(ValueError, match=message):
            schedules.Tabulated(tmp_path / name)
    with pytest.raises(ValueError, match=r"schedule\.key must be one of 'betas', 'alpha_bars'"):
        schedules.Tabulated(tmp_path / "b.npy", "alphas")


def test_the_schedule_that_the_docstring_adds_is_one():
    lines = schedules.base.__doc__.split("configs/schedule:\n\n")[1].split("\nWhat is defined")[0]
    room = {
        **vars(schedules),
        "dataclass": dataclasses.dataclass,
        "bounded": bounded,
        "torch": torch,
        "Tensor": torch.Tensor,
    }
    exec(textwrap.dedent(lines), room)
    schedule = room["PowerLaw"]()
    u = torch.tensor([0.0, 0.25, 1.0])
    alpha, sigma = schedule.alpha_sigma(u)
    torch.testing.assert_close(alpha[1] / sigma[1], torch.tensor(3.0))
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(u)), u.double(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"schedule\.power must be a number in \(0, 100\], but got 0"):
        room["PowerLaw"](power=0)
