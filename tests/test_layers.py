"""The house: which room may import which, what importing costs, and what may not be in the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffaug"
CORE = ("checks", "schedules", "times", "noise", "targets")
ALLOWED = {
    **dict.fromkeys(CORE, ({"torch", "numpy"}, CORE)),
    "kernel": ({"torch"}, CORE),
    "process": ({"torch"}, (*CORE, "kernel")),
}
LIGHTNING = {"pytorch_lightning", "tqdm", "lightning_fabric", "torch", "numpy", "PIL", "torchvision"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "diffaug":
                found |= {f"diffaug.{name.name}" for name in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    outside = {name.split(".")[0] for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names} - {
        "diffaug"
    }
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("diffaug.")} - {room}
    if room in ALLOWED:
        libraries, rooms = ALLOWED[room]
        assert outside <= libraries
        assert inside <= set(rooms)
    elif room in ("__init__", "__main__", "config", "errors", "help", "quiet", "sweeps"):
        pass
    else:
        assert outside <= LIGHTNING
        assert "config" not in inside


def test_heavy_imports_wait():
    """What only some runs need is not loaded by importing diffaug (torchmetrics loads matplotlib by itself)."""

    def loaded(module: str) -> set[str]:
        heavy = ("matplotlib", "diffusers", "sklearn", "scipy", "datasets", "kornia")
        code = f"import sys, {module}; print(*[m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        return set(done.stdout.split())

    assert loaded("diffaug") <= loaded("pytorch_lightning, torchvision")


@pytest.mark.slow
def test_importing_costs_little_more_than_lightning():
    """Both are timed in one import, Lightning's within diffaug's, so that a busy machine slows them alike."""
    command = [sys.executable, "-X", "importtime", "-c", "import diffaug"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr.splitlines()
    parts = [line.removeprefix("import time:").split("|") for line in lines if line.count("|") == 2]
    seconds = {name.strip(): int(total) for _, total, name in parts if name.strip() in ("diffaug", "pytorch_lightning")}
    assert seconds["diffaug"] <= 1.2 * seconds["pytorch_lightning"]


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
