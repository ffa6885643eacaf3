"""Exactness of whole jobs: real Trainers, real processes, real signals; every triple compared bit for bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from recordings import batches, batches_done, check_rest, first_views, go_on, run, same, sequence, triples


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, this one, no workers, 8 images a batch, 3 epochs: what every other run is compared with."""
    out = tmp_path_factory.mktemp("reference")
    recorded.main(str(out), {})
    return out


def test_the_reference_is_whole(reference):
    draws = triples(reference)
    assert {key[:2] for key in draws} == {(epoch, index) for epoch in range(3) for index in range(75)}
    noise = torch.stack([epsilon.flatten() for _, epsilon, _ in draws.values()])
    assert len(torch.unique(noise, dim=0)) == len(draws)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1, "sanity": 2},
        {"batch_size": 7, "num_workers": 1},
        {"batch_size": 75, "shuffle": False},
        {"num_workers": 3, "batch_size": 32},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=str,
)
def test_draws_do_not_depend_on_the_loader(options, reference, tmp_path):
    recorded.main(str(tmp_path), options)
    assert same(triples(tmp_path), triples(reference))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 4), (4, 2)])
def test_draws_do_not_depend_on_the_ranks(ranks, batch_size, reference, tmp_path):
    run(tmp_path, devices=ranks, batch_size=batch_size, fresh=ranks == 2)
    draws = triples(tmp_path)
    assert len(draws) - len(first_views(draws)) == 3 * (-75 % ranks)
    assert same(first_views(draws), triples(reference))
    noise = torch.stack([epsilon.flatten() for _, epsilon, _ in draws.values()])
    assert len(torch.unique(noise, dim=0)) == len(draws)
    # Not the draws alone: the global batches are the same, in the same order.
    ours = [(epoch, [draw for draw in batch if draw[1] == 0]) for epoch, batch in sequence(tmp_path, ranks)]
    assert ours == sequence(reference, 1)
    first = [rank[0]["epsilon"] for rank in batches(tmp_path)]
    assert not any(torch.equal(first[0], other) for other in first[1:])


@pytest.mark.slow
def test_a_rank_that_cannot_compile_takes_all_to_the_eager_path(reference, tmp_path):
    """A compiler that really fails, on rank 1: rank 0 has one, and would else draw with other last bits."""
    done = run(tmp_path, devices=2, batch_size=4, compile=True, no_compiler_on=1)
    said = done.stdout + done.stderr
    assert said.count("torch.compile failed") == 1
    assert "another rank cannot compile the forward process: all ranks take the eager path" in said
    ours, theirs = triples(tmp_path), triples(reference)  # eager
    assert all(torch.equal(x, y) for key in theirs for x, y in zip(ours[key], theirs[key], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "wrapped"), [("ddp_spawn", False), ("ddp_fork", True)])
def test_ranks_that_are_not_commands(strategy, wrapped, tmp_path):
    """Of our DataModule, and of a user's that is wrapped."""
    recorded.main(str(tmp_path / "one"), {"wrapped": wrapped, "max_epochs": 1})
    run(tmp_path / "two", devices=2, batch_size=4, strategy=strategy, wrapped=wrapped, max_epochs=1)
    assert same(first_views(triples(tmp_path / "two")), triples(tmp_path / "one"))


@pytest.fixture(scope="module", params=[{}, {"devices": 2, "batch_size": 4, "num_workers": 2}], ids=str)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, and of two ranks, that was killed in the middle of a step."""
    out = tmp_path_factory.mktemp("killed")
    run(out, expect=None, kill_at=17, **request.param)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "resumed",
    [{"num_workers": 2, "persistent_workers": True}, {"devices": 2, "batch_size": 4, "num_workers": 1}],
    ids=str,
)
def test_a_killed_run_goes_on_exactly(killed, resumed, reference, tmp_path):
    """kill -9, then ckpt_path=, on as many ranks or others: what comes is what the uninterrupted run had left."""
    go_on(killed, tmp_path, **resumed)
    check_rest(tmp_path, resumed.get("devices", 1), reference, batches_done(killed))


def global_batches(out: Path) -> list[list[tuple[Any, ...]]]:
    """What all ranks together were given at each step, each sample with its triple, as bytes; of one shape."""
    steps = []
    for parts in zip(*batches(out), strict=True):
        assert len({part["x_t"].shape[2:] for part in parts}) == 1
        rows = (
            [values[row].numpy().tobytes() for values in part.values() if isinstance(values, torch.Tensor)]
            for part in parts
            for row in range(len(part["t"]))
        )
        steps.append(sorted(map(tuple, rows)))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"kind": "buckets"}, 4),
        ({"kind": "mixture"}, 2),
        ({"recipe": "parts", "train": 72}, 4),
        ({"recipe": "curriculum", "train": 72}, 2),
        ({"recipe": "groups", "train": 72}, 4),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_on_other_ranks(options, others, tmp_path):
    """Two ranks are killed inside an epoch; one goes on, and several, with the rest of the sequence, bit for bit."""
    recorded.main(str(tmp_path / "whole"), {**options, "max_epochs": 2})
    before = tmp_path / "before"
    run(before, expect=None, kill_at=7, devices=2, batch_size=4, **options)
    done = batches_done(before)
    assert done == 6  # of 9 to 11 batches of an epoch
    whole = global_batches(tmp_path / "whole")
    assert global_batches(before)[:done] == whole[:done]
    for ranks in (1, others):
        after = tmp_path / str(ranks)
        go_on(before, after, max_epochs=2, devices=ranks, batch_size=8 // ranks, **options)
        assert global_batches(after) == whole[done:]


@pytest.fixture(scope="module")
def reference_of_72(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of 72 images and 2 epochs, which batches of 4, 6, 8 and 12 all divide."""
    out = tmp_path_factory.mktemp("reference_of_72")
    recorded.main(str(out), {"train": 72, "max_epochs": 2})
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        ({"devices": 2, "batch_size": 6}, {"devices": 3, "batch_size": 4}, 9),
        ({"devices": 3, "batch_size": 4}, {"batch_size": 6}, 9),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_in_other_batches(before, after, done, reference_of_72, tmp_path):
    """On other ranks, after another batch size: after the same samples, each draw as it was."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, expect=None, train=72, kill_at=11, **before)
    go_on(first, second, train=72, max_epochs=2, **after)
    images = done * before["batch_size"] * before.get("devices", 1)
    earlier = {key: value for key, value in triples(first).items() if key in handed_out(first, done)}
    assert len(earlier) == images
    later = triples(second)
    assert earlier.keys().isdisjoint(later)
    assert {key[:2] for key in [*earlier, *later]} == {(epoch, i) for epoch in range(2) for i in range(72)}
    assert same({**earlier, **later}, triples(reference_of_72))


def handed_out(out: Path, done: int) -> set[tuple[int, ...]]:
    """The draws of a run's first global batches."""
    return {(epoch, *draw) for epoch, batch in sequence(out, len(batches(out)))[:done] for draw in batch}


@pytest.mark.slow
def test_ranks_with_uneven_validation_shares_do_not_wait_for_each_other(tmp_path):
    """17 images: a metric that all ranks share at every step of validation needs as many steps on each."""
    run(tmp_path, devices=2, batch_size=4, val=[17], sync=True, max_epochs=1)
    shares = batches(tmp_path, "val0")
    assert len({len(share) for share in shares}) == 1
    assert sorted(int(i) for share in shares for batch in share for i in batch["index"]) == list(range(17))


@pytest.mark.slow
def test_ranks_with_different_seeds_are_refused(tmp_path):
    """seed_everything(42 + rank): each rank would take its share of another order."""
    done = run(tmp_path, expect=None, devices=2, batch_size=4, seeds=42, max_epochs=1)
    assert "The ranks disagree on what they train on" in done.stderr
    assert "seed: 42 on rank 0, 43 on rank 1" in done.stderr
    assert not list(tmp_path.glob("train-*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_only_one_rank_sees_is_refused(rank, reference, tmp_path):
    """As where each node has a disk of its own: the other would train from the beginning."""
    options = {"ckpt_path": str(reference / "last.ckpt"), "sees_it": [rank]}
    done = run(tmp_path, expect=None, devices=2, batch_size=4, max_epochs=4, **options)
    assert re.search(r"begins at: epoch \d, batch \d+ on rank 0, epoch \d, batch \d+ on rank 1", done.stderr)
    assert "A checkpoint to go on from must lie where every node reads it" in done.stderr
    assert not list(tmp_path.glob("train-*"))


@pytest.mark.slow
def test_a_resume_under_another_recipe_is_refused(reference, tmp_path):
    from diffaug import Cosine, DiffusionDataModule, ForwardProcess

    state = torch.load(reference / "last.ckpt", weights_only=True)["DiffusionDataModule"]
    options = {"train": [0], "process": ForwardProcess(Cosine()), "seed": 12}
    with pytest.raises(
        ValueError,
        match=r"(?s)another recipe.*seed: 11 -> 12.*schedule: LinearBeta\(.*-> Cosine\(.*allow_changed_recipe=true",
    ):
        DiffusionDataModule(**options).load_state_dict(state)
    DiffusionDataModule(**options, allow_changed_recipe=True).load_state_dict(state)


@pytest.mark.slow
def test_validation_does_not_move(reference, tmp_path):
    """Epoch after epoch, with the sanity check or without, each validation image keeps its t and its noise."""

    def by_epoch(out: Path, number: int) -> list[list[dict[str, Any]]]:
        (rank,) = batches(out, f"val{number}")
        return [rank[i : i + 2] for i in range(0, len(rank), 2)]

    recorded.main(str(tmp_path), {"sanity": 2, "max_epochs": 1})
    for number in (0, 1):
        first, *others = by_epoch(reference, number)
        assert len(others) == 2
        for other in [*others, *by_epoch(tmp_path, number)]:
            assert all(
                torch.equal(a[k], b[k])
                for a, b in zip(first, other, strict=True)
                for k in ("x_t", "epsilon", "t", "index")
            )
    # Two validation sets of the same images have each their own noise.
    assert not torch.equal(by_epoch(reference, 0)[0][0]["epsilon"], by_epoch(reference, 1)[0][0]["epsilon"])


@pytest.mark.slow
def test_views_are_side_by_side_and_differ(tmp_path):
    recorded.main(str(tmp_path), {"views": 3, "max_epochs": 1})
    ((first, *_),) = batches(tmp_path)
    assert torch.equal(first["index"], first["index"][::3].repeat_interleave(3))
    assert first["view"].tolist() == [0, 1, 2] * 8
    assert len(torch.unique(first["epsilon"].flatten(1), dim=0)) == 24
    assert len(triples(tmp_path)) == 75 * 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_every_precision_gets_the_right_noise(precision, reference, tmp_path):
    recorded.main(str(tmp_path), {"precision": precision, "max_epochs": 1})
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    single = triples(reference)
    for key, (x_t, epsilon, t) in triples(tmp_path).items():
        expected = single[key]
        assert x_t.dtype == epsilon.dtype == dtype
        assert torch.equal(t, expected[2])
        assert torch.equal(epsilon, expected[1].to(dtype))
        assert torch.equal(x_t, expected[0].to(dtype))
