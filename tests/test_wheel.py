"""The package as others get it: a wheel in an environment of its own, and an editable install, from another folder.

The environments hold diffaug alone; what it depends on (6 GB) is the one of this test run, by a .pth file.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from shared import ROOT

pytestmark = pytest.mark.slow

APP = """
import diffaug, hydra
from diffaug.config import config_dir
from hydra.utils import instantiate

@hydra.main(config_path="mine", config_name="app", version_base="1.3")
def main(config):
    print(diffaug.__file__, config_dir(), repr(instantiate(config.schedule)), config.data.size)

main()
"""


def run(*words: object, folder: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=200, cwd=folder, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(params=["wheel", "editable"])
def installed(request, tmp_path) -> tuple[Path, Path]:
    """A Python that has diffaug as a wheel, or as an editable install, and the folder of the package it finds."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]
    if request.param == "wheel":
        run(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", tmp_path / "dist", ROOT, folder=tmp_path)
        wheel = next((tmp_path / "dist").glob("diffaug-*.whl"))
        run(*pip, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
        assert (site / "diffaug" / "configs" / "train.yaml").is_file()
    else:
        run(*pip, "install", "--no-deps", "-e", ROOT, folder=tmp_path)
    # As plain folders: their own .pth files, an editable diffaug's among them, are not read.
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site / "diffaug" if request.param == "wheel" else ROOT / "diffaug"


def test_used_from_another_folder(installed, tmp_path):
    python, package = installed
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mine" / "data").mkdir(parents=True)
    assert "bits" in run(python, "-m", "diffaug", "report", "schedule=cosine", folder=elsewhere)

    # A Hydra application of one's own: the package's groups are found, its own come first.
    (elsewhere / "app.py").write_text(APP)
    (elsewhere / "mine" / "app.yaml").write_text("defaults: [schedule: cosine, data: digits]\n")
    (elsewhere / "mine" / "data" / "digits.yaml").write_text("size: 123\n")
    where, configs, rest = run(python, "app.py", "schedule.timesteps=10", folder=elsewhere).split(maxsplit=2)
    assert Path(where).parent == package
    assert Path(configs) == (package if (package / "configs").is_dir() else ROOT) / "configs"
    assert "Cosine(timesteps=10" in rest
    assert "123" in rest
