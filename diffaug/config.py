"""The package's configs, for Hydra: found from a wheel and from a checkout.

``import diffaug`` is enough for an application of one's own to write ``defaults: [schedule: cosine]``; its own
groups come first. (Hydra's discovery of plugins by package does not see editable installs, Hydra issue 2359;
registering at import does.)
"""

import json
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffaug.checks import flag, integer
from diffaug.help import page

_log = logging.getLogger("diffaug")


def config_dir() -> Path:
    """Find the folder of configs: diffaug/configs in a wheel, configs beside diffaug in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "schedule").is_dir():
            return folder
    raise FileNotFoundError(
        f"diffaug's configs are neither in {here} nor in {here.parent}: the installation is broken."
    )


class DiffaugSearchPath(SearchPathPlugin):
    """Appends the package's configs to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("diffaug", config_dir().as_uri())


Plugins.instance().register(DiffaugSearchPath)
OmegaConf.register_new_resolver("diffaug.help", page, replace=True)


def _shape_of(root: str | None) -> ListConfig:
    from diffaug.store.layout import shape_of  # only here: importing diffaug, which registers this, is to stay quick

    if root is None:
        raise ValueError("data.root is not set and has no default: give it the folder of a store by data.root=...")
    return ListConfig(shape_of(root))


def _folder_shape(channels: int, side: int, area: int | None, shapes: Sequence[Any] | None) -> ListConfig:
    """Return [channels, side, side], or, with buckets, [channels, null, null]: the sides are each batch's own."""
    return ListConfig([channels, side, side] if area is None and shapes is None else [channels, None, None])


OmegaConf.register_new_resolver("diffaug.shape_of", _shape_of, replace=True)
OmegaConf.register_new_resolver("diffaug.folder_shape", _folder_shape, replace=True)


def compose_config(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """Compose the configs as train.py does, with these overrides."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, [*overrides, "folder=."])


def schedule_names() -> list[str]:
    """List the schedules of the package, by their YAML names."""
    return sorted(path.stem for path in (config_dir() / "schedule").glob("*.yaml"))


def check_words(trainer: DictConfig) -> None:
    """Refuse yes, no, on and off among a Trainer's arguments: Hydra makes strings of them, all of which are true."""
    arguments: Any = OmegaConf.to_container(trainer)
    for key, value in arguments.items():
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
            flag(f"trainer.{key}", value)


_PLACES = {
    "part_law": "part_law@process.parts.law",
    "coverage": "coverage@times.coverage",
    "encoder": "encoder@data.encoder",
}


def check_keys(config: DictConfig, hydra: Any) -> None:
    """Refuse a top-level key that a command line appends, +shedule=cosine, to a config that has no such key.

    Hydra's own error of shedule=cosine proposes it; nothing would read it, and the run be another than was meant. A
    key that another word refers to, as ${key}, is read.

    Arguments:
        config: as composed.
        hydra: Hydra's own config, of the words; a user's own primary config may hold what it likes.

    Raises:
        ValueError: with the key that may have been meant.
    """
    if hydra.job.config_name != "train":
        return
    primary = OmegaConf.load(config_dir() / "train.yaml")
    groups = [str(group) for default in primary.defaults if isinstance(default, DictConfig) for group in default]
    known = {*map(str, primary), *groups} - {"defaults", "experiment", "parts"}  # of these two the keys lie elsewhere
    inner = {str(key): f"{name}.{key}" for name in ("trainer", "data", "process") for key in config[name]}
    places = {**inner, **_PLACES, "parts": "process.parts", **{name: name for name in known}}
    words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    for word in words:
        path, equals, value = word.lstrip("+").partition("=")
        key, *rest = path.rpartition("@")[2].split(".")
        read = any(f"${{{key}" in other for other in words)
        if word.startswith("+") and key in config and key not in known and not read:
            near = get_close_matches(key, places, 1)
            meant = f"did you mean {'.'.join([places[near[0]], *rest])}{equals}{value}?" if near else "its keys are "
            meant += "" if near else ", ".join(sorted(known)) + "."
            raise ValueError(f"{word}: {key} is no key of train.py, so that nothing would read it: {meant}")


def seed_all(seed: int | None) -> None:
    """Seed the global random states, of which the network's first weights are drawn.

    Arguments:
        seed: in [0, 2^64), as `DiffusionDataModule` takes it; Lightning's is its low 32 bits. None:
            PL_GLOBAL_SEED, or else 0.
    """
    from lightning_fabric import seed_everything  # here, as it takes seconds; it serves both packages

    low = None if seed is None else integer("seed", seed, 0, 2**64 - 1) % 2**32
    seed_everything(low, workers=True, verbose=False)  # the log of a run names data.seed


def checkpoint_path(ckpt_path: str | None, folder: str) -> str | None:
    """Find the checkpoint to go on from.

    Arguments:
        ckpt_path: ``auto``, the last one of the run in ``folder`` if it has any: last.ckpt, or else the newest;
            ``last``, last.ckpt; a file; or None, none. A checkpoint of several files is a folder.
        folder: the run's.

    Raises:
        FileNotFoundError: it is not there; lists the runs that have one.
    """
    if ckpt_path is None:
        return None
    path = Path(folder, "checkpoints", "last.ckpt") if ckpt_path in ("auto", "last") else Path(ckpt_path)
    if path.exists():
        return str(path)
    if ckpt_path == "auto":
        others = sorted(
            (path for path in Path(folder).glob("**/checkpoints/*.ckpt") if not _of_a_run_within(path, Path(folder))),
            key=lambda path: path.stat().st_mtime,
        )
        if not others:
            return None
        _log.warning("ckpt_path=auto: there is no %s, so the run goes on from %s, the newest", path, others[-1])
        return str(others[-1])
    runs = sorted(
        found.parent.parent for top in ("outputs", "multirun") for found in Path(top).glob("**/checkpoints/last.ckpt")
    )
    known = "\n  ".join(f"hydra.run.dir={run}" for run in runs) if runs else "(none under outputs/ and multirun/)"
    raise FileNotFoundError(
        f"ckpt_path={ckpt_path}: there is no {path} (callbacks=none writes none). Runs that can be gone on with by "
        f"ckpt_path=last:\n  {known}"
    )


def _of_a_run_within(path: Path, folder: Path) -> bool:
    """Return whether a file in a run's folder is another run's, whose folder is within that one."""
    between = path.relative_to(folder).parents[:-1]
    return any((folder / inner / ".hydra").is_dir() for inner in between)


def report(folder: str) -> str:
    """Format what a finished run came to, from the files in its folder; where that is, if it left no summary."""
    where = Path(folder)
    if not (where / "summary.json").is_file():
        return f"\neverything is in {where}"
    summary = json.loads((where / "summary.json").read_text())
    pictures = sorted(path.name for path in where.glob("*.png"))
    loss, kl = summary["val_loss"], summary["prior_kl_bits_per_dim"]
    return "\n".join(
        [
            "",
            f"{summary['steps']} steps in {summary['seconds']:.0f} s; everything is in {where}",
            f"  pictures         {', '.join(pictures) or 'none'}",
            f"  validation loss  {'not measured' if loss is None else format(loss, '.4f')}",
            f"  x_T to N(0, I)   {'not measured' if kl is None else f'{kl:.3g} bits per dimension'}",
            f"  schedule         {summary['schedule']}",
        ]
    )
