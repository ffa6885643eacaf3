"""The runs of recorded.py, started by tests, and what they wrote, read and compared."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import recorded
import server
import torch
from shared import HERE


def run(out: Path, *, expect: int | None = 0, fresh: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run recorded.py to its end. ``expect`` is its exit status; None is any but 0."""
    words = [sys.executable, str(HERE / "jobs" / "recorded.py"), str(out), json.dumps(options)]
    done = server.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, fresh=fresh)
    assert (done.returncode != 0) if expect is None else (done.returncode == expect), done.stderr[-3000:]
    return done


def batches(out: Path, stage: str = "train") -> list[list[dict[str, Any]]]:
    """What each rank was given, in order."""
    ranks = []
    for path in sorted(out.glob(f"{stage}-*")):
        with path.open("rb") as file:
            rank = []
            while file.peek(1):
                rank.append(pickle.load(file))
        ranks.append(rank)
    return ranks


def triples(out: Path, stage: str = "train") -> dict[tuple[int, ...], tuple[torch.Tensor, ...]]:
    """Every draw of a run, by (epoch, sample index, view): x_t, epsilon and t. No draw may come twice."""
    found: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
    for rank in batches(out, stage):
        for batch in rank:
            for i in range(len(batch["t"])):
                key = (batch["epoch"], int(batch["index"][i]), int(batch["view"][i]))
                assert key not in found, key
                found[key] = tuple(batch[name][i] for name in ("x_t", "epsilon", "t"))
    return found


def first_views(draws: dict[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
    """The draws without those of the padding, whose samples come a second time, as other views."""
    return {key: value for key, value in draws.items() if key[2] == 0}


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def sequence(out: Path, ranks: int) -> list[tuple[int, list[tuple[int, ...]]]]:
    """The global batches in order: epoch, and the sorted draws of all ranks together."""
    share = batches(out)
    assert len(share) == ranks
    return [
        (
            parts[0]["epoch"],
            sorted((int(i), int(v)) for part in parts for i, v in zip(part["index"], part["view"], strict=True)),
        )
        for parts in zip(*share, strict=True)
    ]


def batches_done(out: Path) -> int:
    loops = torch.load(out / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


def go_on(before: Path, after: Path, **options: Any) -> None:
    """Go on with a run, in this process if on one rank."""
    options |= {"ckpt_path": str(before / "last.ckpt")}
    if options.get("devices", 1) == 1:
        recorded.main(str(after), options)
    else:
        run(after, **options)


def check_rest(after: Path, ranks: int, whole: Path, done: int) -> None:
    """Check that what a run was given is what an uninterrupted one, of one rank, had left after so many batches."""
    rest = [(epoch, [draw for draw in batch if draw[1] == 0]) for epoch, batch in sequence(after, ranks)]
    assert 0 < done < 30
    assert rest == sequence(whole, 1)[done:]
    single, draws = triples(whole), first_views(triples(after))
    assert same(draws, {key: single[key] for key in draws})
