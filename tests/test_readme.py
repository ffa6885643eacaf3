"""What the documents show works.

Every Python block of the README and of docs/ is run, in order, one page at a time; every train.py command that needs no
GPU, no cluster, no download and no earlier run is run for two steps. (Sweeps and resumes have tests of their own.)
"""

import re

import pytest
from PIL import Image
from shared import ROOT
from tiny import OVERRIDES, train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("page", "compiled"),
    [*((page, False) for page in PAGES), pytest.param(PAGES[0], True, marks=pytest.mark.slow)],
    ids=lambda value: getattr(value, "name", None),
)
def test_python_blocks_run(page, compiled, tmp_path, monkeypatch):
    """As where there is no compiler; the README as it is too: each size of image takes seconds to compile."""
    monkeypatch.chdir(tmp_path)
    if not compiled:
        monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: False)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


NOT_HERE = re.compile(r"-m |hydra|fsdp|devices=8|data=(fashion_mnist|cifar10|store)")
COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"^python train\.py (.*)$", page.read_text(), re.MULTILINE)
        if not NOT_HERE.search(command)
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_for_two_steps(command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(16):
        Image.new("L", (272, 264), 16 * i).save(photos / f"{i}.png")
    here = [f"data.root={photos}", "data.channels=1"] if "image_folder" in command else []
    network = "experiment=diffusion_forcing" in command  # of clips, which the tests' own does not take
    overrides = [word for word in OVERRIDES if not (network and word.startswith("model."))]
    words = [*command.split(), *overrides, *here, "process.compile=false"]
    train(tmp_path, *words, f"hydra.run.dir={tmp_path}/run")
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert (tmp_path / "run/summary.json").exists()


def test_there_are_commands_to_run():
    assert len(COMMANDS) >= 7


def test_links_and_pictures_are_there():
    """Every relative link of the README, CONTRIBUTING and docs/, and the heading it leads to."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, heading = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name}: {link}"
