"""Importance by loss: against the paper's algorithm written plainly, one loss at a time, and what a resume needs.

The false-alarm chance of the one statistical test is 1e-6; its draws are keyed.
"""

import copy
import io
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from scipy import stats
from torch.overrides import TorchFunctionMode

from diffaug.randomness.keys import Keys
from diffaug.schedules import LinearBeta, Rectified
from diffaug.times import Importance, Stratified, Uniform

T = 20
SCHEDULE = LinearBeta(timesteps=T)


class Plain:
    """Nichol and Dhariwal's resampler as a list of losses for each t."""

    def __init__(self, history: int = 10, share: float = 0.001) -> None:
        self.losses = [[] for _ in range(T)]
        self.history, self.share = history, share

    def update(self, t: list[int], loss: list[float]) -> None:
        for one, value in zip(t, loss, strict=True):
            if math.isfinite(value):
                self.losses[one] = [*self.losses[one], value][-self.history :]

    def p(self) -> np.ndarray:
        if any(len(losses) < self.history for losses in self.losses):
            return np.full(T, 1 / T)
        p = np.array([math.sqrt(sum(x * x for x in losses) / self.history) for losses in self.losses])
        return (1 - self.share) * p / p.sum() + self.share / T


def p_of(times: Importance) -> np.ndarray:
    """The probabilities as they are drawn from: the share of a fine grid."""
    return 1 / (T * times.importance_weight(torch.arange(T), SCHEDULE).double().numpy())


def drawn_once(times: Importance) -> Importance:
    times.draw(Keys.pack(torch.arange(1)), SCHEDULE)
    return times


def batches(seed: int, count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        t = (torch.rand(size, generator=g) ** 2 * T).long()  # some t many times in a batch
        out.append((t, (torch.rand(size, generator=g) + 0.1) * (1 + t) ** 1.5))
    return out


@pytest.mark.parametrize(("history", "size"), [(10, 64), (3, 200), (1, 16)])
def test_it_is_the_papers_resampler(history: int, size: int, same_random_state: None) -> None:
    times, plain = drawn_once(Importance(history, 0.01)), Plain(history, 0.01)
    warm = []
    for t, loss in batches(1, 30, size):
        times.update(t, loss)
        plain.update(t.tolist(), loss.tolist())
        assert p_of(times) == pytest.approx(plain.p(), rel=2e-7)
        kept = times.table.losses[:-1]
        for one in range(T):
            expected = torch.tensor(plain.losses[one], dtype=torch.float32)
            assert torch.equal(kept[one][kept[one] != 0].sort().values, expected.sort().values)
        warm.append(not np.allclose(plain.p(), 1 / T))
    assert warm[-1]
    assert not warm[0] or size > T * history / 2  # it was seen cold and warm


def test_one_t_more_often_in_a_batch_than_the_table_is_wide_keeps_the_last() -> None:
    times = drawn_once(Importance(4))
    times.update(torch.full((11,), 3), torch.arange(11.0))
    assert times.table.losses[3].tolist() == [8.0, 9.0, 10.0, 7.0]
    assert times.table.counts[3] == 11
    times.update(torch.tensor([3, 5, 3]), torch.tensor([20.0, 1.0, 21.0]))
    assert times.table.losses[3].tolist() == [21.0, 9.0, 10.0, 20.0]
    assert times.table.losses[5].tolist() == [1.0, 0.0, 0.0, 0.0]


class NoTwoWrites(TorchFunctionMode):
    """Fail where one place of the table is written twice at once: on a GPU either could win."""

    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            row, slot = (i[args[1][0] < T] for i in args[1])
            assert len({*zip(row.tolist(), slot.tolist(), strict=True)}) == len(row)
            NoTwoWrites.seen += len(row)
        return func(*args, **(kwargs or {}))


def test_no_place_of_the_table_is_written_twice_at_once() -> None:
    times = drawn_once(Importance(3))
    with NoTwoWrites():
        for t, loss in batches(3, 5, 100):
            times.update(t, loss)
    assert NoTwoWrites.seen > 100


def warm(history: int = 2, share: float = 0.001) -> Importance:
    times = drawn_once(Importance(history, share))
    for t, loss in batches(2, 40, 32):
        times.update(t, loss)
    assert p_of(times).std() > 0.01
    return times


def test_draws_follow_p_and_the_weight_undoes_it() -> None:
    times, n = warm(), 100_000
    t = times.draw(Keys.pack(torch.arange(n), seed=4), SCHEDULE)
    p = p_of(times)
    assert stats.chisquare(np.bincount(t.numpy(), minlength=T), p / p.sum() * n).pvalue > 1e-6
    assert p.sum() == pytest.approx(1, rel=1e-6)
    weight = times.importance_weight(t, SCHEDULE)
    assert weight.dtype == torch.float32
    # The weighed mean of any loss is its mean over uniform times.
    loss = torch.arange(T).double() ** 2
    exact = (torch.from_numpy(p) * times.importance_weight(torch.arange(T), SCHEDULE).double() * loss).sum()
    assert exact.item() == pytest.approx(loss.mean().item(), rel=1e-6)
    estimate = (weight.double() * loss[t]).mean().item()
    spread = (weight.double() * loss[t]).std().item() / math.sqrt(n)
    assert abs(estimate - loss.mean().item()) < 5 * spread
    assert bool((Uniform().importance_weight(t, SCHEDULE) == 1).all())


def test_it_is_uniform_until_every_t_has_its_losses() -> None:
    times = drawn_once(Importance(10))
    most = torch.arange(T).repeat(9)
    times.update(most, torch.rand(len(most)))
    times.update(torch.arange(T - 1), torch.rand(T - 1))
    assert bool((times.importance_weight(torch.arange(T), SCHEDULE) == 1).all())
    times.update(torch.tensor([T - 1]), torch.tensor([9.0]))
    assert p_of(times).argmax() == T - 1


def test_no_loss_can_break_it() -> None:
    times = warm()
    before = p_of(times)
    times.update(torch.tensor([1, 2, 3]), torch.tensor([math.nan, math.inf, -math.inf]))
    assert np.array_equal(p_of(times), before)
    zero = drawn_once(Importance(1))
    zero.update(torch.arange(T), torch.zeros(T))
    assert p_of(zero) == pytest.approx(np.full(T, 1 / T))
    one = drawn_once(Importance(1))
    one.update(torch.arange(T), torch.arange(T).eq(7) * 1e30)
    q = torch.tensor([2.0**-54, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert one.quantile(q, SCHEDULE).tolist() == [0, 7, T - 1]  # no t is out of reach
    loss = torch.rand(4, requires_grad=True)
    one.update(torch.arange(4), loss)
    assert not one.table.losses.requires_grad
    with torch.inference_mode():
        times = drawn_once(Importance(1))
    assert not times.table.losses.is_inference()
    times.update(torch.arange(4), torch.rand(4))


@pytest.mark.parametrize("coverage", [None, Stratified()], ids=["independent", "stratified"])
def test_a_resume_goes_on_exactly(coverage: Stratified | None) -> None:
    def made() -> Importance:
        return Importance(2) if coverage is None else Importance(2, coverage=coverage)

    def go_on(times: Importance, begin: int, end: int) -> list[torch.Tensor]:
        out = []
        for step in range(begin, end):
            position = torch.arange(64) + 64 * step
            t = times.draw(Keys.pack(position), SCHEDULE, position)
            times.update(t, (t + 1.0) * (1 + torch.sin(position.float())))
            out.append(t)
        return out

    whole = go_on(made(), 0, 20)
    times = made()
    go_on(times, 0, 12)
    file = io.BytesIO()
    torch.save(times.state_dict(), file)
    file.seek(0)
    resumed = made()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    go_on(times, 12, 14)  # what was saved is apart from what goes on
    rest = go_on(resumed, 12, 20)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[12:], strict=True))
    assert not torch.equal(go_on(made(), 12, 13)[0], whole[12])  # the table matters
    other = copy.deepcopy(resumed)
    other.update(torch.arange(T), torch.full((T,), 99.0))
    assert not torch.equal(other.table.losses, resumed.table.losses)
    assert other == resumed


def test_what_is_refused_says_why() -> None:
    with pytest.raises(ValueError, match=r"continuous and has none.*schedule=discretised"):
        Importance().check(Rectified())
    with pytest.raises(ValueError, match="draw a batch first"):
        Importance().update(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    times = warm()
    with pytest.raises(ValueError, match=r"loss must be one number for each sample's t.*shape \(\)"):
        times.update(torch.zeros(2, dtype=torch.int64), torch.tensor(1.0))
    with pytest.raises(ValueError, match="are of 20 timesteps, 2 each, but 30 and 2 are wanted"):
        times.draw(Keys.pack(torch.arange(2)), LinearBeta(timesteps=30))
    with pytest.raises(ValueError, match=r"times\.history is 3, but .*\(21, 2\)"):
        Importance(3).load_state_dict(times.state_dict())
    fresh = Importance()
    fresh.load_state_dict(Importance().state_dict())  # saved before anything was drawn
    drawn_once(fresh)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads of the process before
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    times = drawn_once(Importance(3))
    for t, loss in batches(5, 12, 32):
        times.update(t[rank * 16 : rank * 16 + 16], loss[rank * 16 : rank * 16 + 16])
    torch.save(times.state_dict(), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_table_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    one = drawn_once(Importance(3))
    for t, loss in batches(5, 12, 32):
        one.update(t, loss)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(state["counts"], one.table.counts)
        assert torch.equal(state["losses"][:-1], one.table.losses[:-1])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    cpu, gpu = warm(), warm()
    key = Keys.pack(torch.arange(64))
    on_gpu = Keys.pack(torch.arange(64, device="cuda"))
    loss = torch.rand(64, device="cuda")
    gpu.draw(on_gpu, SCHEDULE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        t = gpu.draw(on_gpu, SCHEDULE)
        gpu.update(t, loss)
        weight = gpu.importance_weight(t, SCHEDULE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cpu.draw(key, SCHEDULE), t.cpu())
    cpu.update(t.cpu(), loss.cpu())
    assert torch.allclose(cpu.importance_weight(t.cpu(), SCHEDULE), weight.cpu())
