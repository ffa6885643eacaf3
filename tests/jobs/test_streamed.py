"""Whole jobs on litdata's and MosaicML's streaming datasets: killed, and gone on with on other ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded
from recordings import batches_done, check_rest, first_views, run, same, sequence, triples
from shared import HERE


def write(library: str, root: Path) -> dict[str, str]:
    """Write the images that recorded.py trains on, in shards of ten or so; return what it is told."""
    tensors = recorded.images(75, 0).tensors[0]
    if library == "litdata":
        reason = "litdata is not installed (pip install diffaug[streams])"
        cache = pytest.importorskip("litdata", reason=reason).streaming.Cache(str(root), chunk_size=10)
        for index, image in enumerate(tensors):
            cache[index] = {"image": image}
        cache.done()
        cache.merge()
    else:
        made = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed (diffaug[streams])")
        with made.MDSWriter(out=str(root), columns={"image": "ndarray:uint8"}, size_limit=500) as writer:
            for image in tensors:
                writer.write({"image": image[0].numpy()})
    return {"kind": library, "root": str(root)}


@pytest.fixture(scope="module", params=["litdata", "mosaic"])
def stream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write(request.param, tmp_path_factory.mktemp(request.param) / "set")


@pytest.fixture(scope="module")
def whole(stream: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no workers, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(out, **stream)
    return out


def run_on(ranks: int, out: Path, *, expect: int | None = 0, **options: Any) -> None:
    """Run recorded.py on so many ranks, by torchrun, which MosaicML's dataset needs."""
    if ranks == 1:
        run(out, expect=expect, **options)
        return
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    options = {**options, "devices": ranks, "batch_size": 8 // ranks}
    words += [str(HERE / "jobs" / "recorded.py"), str(out), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) if expect is None else (done.returncode == expect), done.stderr[-3000:]


@pytest.mark.slow
def test_draws_are_those_of_the_images_in_memory(whole, tmp_path):
    recorded.main(str(tmp_path), {})
    assert same(triples(whole), triples(tmp_path))
    assert sequence(whole, 1) != sequence(tmp_path, 1)  # but in another order, by the shards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "resumed"),
    [((1, 2), (1, 0)), ((1, 0), (2, 2)), ((2, 0), (1, 2))],
    ids=lambda shape: "{} ranks, {} workers".format(*shape),
)
def test_a_killed_run_goes_on_exactly(killed, resumed, stream, whole, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    run_on(killed[0], before, expect=None, num_workers=killed[1], kill_at=17, **stream)
    run_on(resumed[0], after, num_workers=resumed[1], ckpt_path=str(before / "last.ckpt"), **stream)
    check_rest(after, resumed[0], whole, batches_done(before))


@pytest.mark.slow
def test_litdata_on_ranks_that_lightning_starts(tmp_path):
    stream = write("litdata", tmp_path / "set")
    run(tmp_path / "one", max_epochs=1, **stream)
    run(tmp_path / "two", max_epochs=1, devices=2, batch_size=4, fresh=True, **stream)
    assert same(first_views(triples(tmp_path / "two")), triples(tmp_path / "one"))
