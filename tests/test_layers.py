"""The house: which room may import which, what importing costs, and what may not be in the tree."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shared import ROOT

PACKAGE = ROOT / "diffaug"
ORDER = (
    *("checks", "randomness", "schedules", "times", "noise", "targets", "process"),  # the library
    *("interop", "plots"),
    *("images", "order", "datasets", "store", "loader", "on_device", "datamodules", "encoding"),  # the way of the data
    *("training", "pytorch_lightning", "lightning"),  # the job
    *("help", "config", "registration", "commands", "__main__"),  # the command line
)
"""The rooms, each of which may import those before it."""
LIBRARY = ORDER[: ORDER.index("images")]
"""The rooms that know no Hydra, and nothing of Lightning."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports(module: str) -> set[str]:
    """The modules that a file imports anywhere: at its top, within functions, and for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else node.module for name in whole}
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_place():
    rooms = {room(module) for module in FILES} - {"__init__"}
    assert rooms == set(ORDER)
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("module", [module for module in FILES if room(module) != "__init__"])
def test_imports_run_one_way(module):
    own = room(module)
    inside = {room(name) for name in imports(module) if name.split(".")[0] == "diffaug"} - {own}
    assert inside <= set(ORDER[: ORDER.index(own)])
    outside = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {"diffaug"}
    if own in LIBRARY:
        assert not outside & {"lightning_fabric", "hydra", "omegaconf"}
    if own not in ("training", "help", "config", "commands", "__main__"):
        assert not outside & {"hydra", "omegaconf"}
    # The two packages of Lightning are each imported in one room: all else runs under both.
    assert outside & {"pytorch_lightning", "lightning"} <= {own}


def test_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module) & FILES.keys()):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


FORKS = """
import os, sys, torch
for code in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""


def after_torch(*codes: str) -> list[str]:
    """What each code prints, a line, in a process of its own that has imported torch and nothing else."""
    done = subprocess.run([sys.executable, "-c", FORKS, *codes], capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_heavy_imports_wait():
    """What only some uses need is not loaded by importing diffaug, and one package of Lightning loads not the other."""
    heavy = ("matplotlib", "diffusers", "sklearn", "scipy", "datasets", "kornia", "torchvision", "lightning_fabric")
    heavy += ("hydra", "omegaconf", "pytorch_lightning", "lightning")
    codes = ("import diffaug; diffaug.ForwardProcess(diffaug.LinearBeta())",)
    codes += ("from diffaug import DiffusionDataModule", "from diffaug.lightning import DiffusionDataModule")
    loaded = after_torch(*(f"{code}\nprint(*[m for m in {heavy} if m in sys.modules])" for code in codes))
    nothing, ours, theirs = (set(line.split()) for line in loaded)
    assert nothing == set()
    assert "lightning" not in ours
    assert "pytorch_lightning" not in theirs


COMPOSED = """
from hydra import compose, initialize
with initialize(None, version_base=None):
    print(compose(overrides=["+schedule=cosine"]).schedule._target_)
assert hydra.__spec__.loader is hydra.__loader__ and "SourceFileLoader" in str(hydra.__loader__)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "diffaug.registration"]
"""


@pytest.mark.slow
def test_hydra_knows_the_configs_whichever_is_imported_first():
    imports = ("import diffaug, hydra", "import hydra, diffaug", "import diffaug.config, hydra")
    imports += ("import diffaug.interop, hydra.core",)
    assert after_torch(*(f"{line}\n{COMPOSED}" for line in imports)) == ["diffaug.schedules.Cosine"] * 4


@pytest.mark.slow
def test_importing_costs_little_more_than_torch():
    """At most a tenth, both timed in one process; of three, since a busy machine may slow one of the two."""

    def share() -> float:
        command = [sys.executable, "-X", "importtime", "-c", "import torch, diffaug"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr.splitlines()
        parts = [line.removeprefix("import time:").split("|") for line in lines if line.count("|") == 2]
        seconds = {name.strip(): int(total) for _, total, name in parts if name.strip() in ("diffaug", "torch")}
        return seconds["diffaug"] / seconds["torch"]

    assert any(share() <= 0.1 for _ in range(3))


def test_tracked_files_speak_of_the_product_alone():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if not path.is_file() or path.suffix in (".png", ".svg"):
            continue
        assert path.stat().st_size < 10**6, name
        assert not re.search(r"https?://[^\s\"']*(?:/simple/|registry\.)", path.read_text()), name
