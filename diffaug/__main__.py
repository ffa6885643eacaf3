"""python -m diffaug report | plot | preview | check | encode | export: look before you train, take it along afterwards.

report [group=choice] [key=value ...]       a recipe in numbers: schedule, terminal SNR, prior KL, what it trains on
report --all                                every schedule of the package, a line each
plot schedules NAME ... [out=...]           beta, alpha_bar, alpha and sigma, log-SNR over time
plot recipes EXPERIMENT ... [out=...]       what recipes train on: share of the draws and of the loss over log-SNR
plot strip NAME ... [data=...] [out=...]    one image from x_0 to x_T under several schedules [sizes=16,64]
plot levels FOLDER_OR_CSV [out=...]         loss by noise level, as a run with callbacks=loss_by_level left it
preview [group=choice] ... [out=...]        your own data through the whole pipe: values, noised strip, times, warnings
check [data=...] [workers=N]                every image of the dataset read; which are broken, for data.on_error=skip
                                            (exit status 3 where any is)
encode [data=...] out=FOLDER [keep=label]   the dataset decoded once, into a store for data=store data.root=FOLDER
                                            [trainer=ddp trainer.devices=8]; run again, it goes on; latents, with
                                            encoder@data.encoder=autoencoder_kl [dtype=float32 or float16, bfloat16]
                                            [variants=identity,hflip]: each encoded, one drawn at every visit
export ckpt=RUN out=FOLDER                  a trained run as a diffusers pipeline folder

out= is a .png, .svg or .pdf file; the numbers of a picture go beside it as .csv. A NAME may carry overrides of its own:
cosine,schedule.timesteps=4000.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diffaug import plots
from diffaug.checks import choice
from diffaug.commands.check import check
from diffaug.commands.plot import first_image, read_levels, write_label
from diffaug.commands.preview import preview
from diffaug.commands.report import page, table
from diffaug.config import compose_config, schedule_names
from diffaug.training.errors import sentence
from diffaug.training.quiet import quieten

_A_DAY = 24 * 60  # in minutes
_BROKEN = 3  # the exit status of a check that found broken images; 1 is an error's, 2 argparse's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        "python -m diffaug", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = {"report": _report, "plot": _plot, "preview": _preview, "check": _check, "encode": _encode}
    runs["export"] = _export
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(runs))
    for name, run in runs.items():
        one = commands.add_parser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(run=run)
        if name == "report":
            one.add_argument("--all", action="store_true", help="every schedule, a line each")
        if name == "plot":
            one.add_argument("picture", choices=("schedules", "recipes", "strip", "levels"))
        one.add_argument("overrides", nargs="*", help="group=choice and key=value, as for train.py")
    options = parser.parse_args(arguments or ["--help"])
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"python -m diffaug {options.command}: {sentence(error) or error}", file=sys.stderr)
        return 1


def _report(options: argparse.Namespace) -> None:
    if options.all:
        schedules = {
            name: instantiate(compose_config([*options.overrides, f"schedule={name}"]).schedule)
            for name in schedule_names()
        }
        print(table(schedules))
    else:
        print(page(instantiate(compose_config(options.overrides).process)))


def _plot(options: argparse.Namespace) -> None:
    picture: str = options.picture
    own, rest = _own(options.overrides, out=f"{picture}.png", sizes="", loss="F")
    names = [part for part in rest if "=" not in part.split(",")[0]]
    common = [part for part in rest if part not in names]
    if not names:
        raise ValueError(f"plot {picture} wants at least one name; python -m diffaug plot --help shows the forms.")
    if picture == "levels":
        made_picture = plots.levels(read_levels(names))
    elif picture == "recipes":
        made_picture = plots.recipes(
            {
                write_label(name, "experiment"): instantiate(
                    compose_config([*common, *_chosen("experiment", name)]).process
                )
                for name in names
            },
            loss=own["loss"],
        )
    else:
        schedules = {
            write_label(name, "schedule"): instantiate(compose_config([*common, *_chosen("schedule", name)]).schedule)
            for name in names
        }
        if picture == "schedules":
            made_picture = plots.schedules(schedules)
        else:
            data = _data(compose_config(common))
            sizes = [int(size) for size in own["sizes"].strip("[]").split(",") if size]
            made_picture = plots.strip(schedules, first_image(data), sizes=sizes)
    print(made_picture.save(own["out"]))


def _data(config: DictConfig) -> Any:
    import_module(config.lightning.diffaug)  # what is missing is said in its own words
    return instantiate(config.data)


def _chosen(group: str, name: str) -> list[str]:
    choice, *overrides = name.split(",")
    return [f"{group}={choice}", *overrides]


def _preview(options: argparse.Namespace) -> None:
    own, rest = _own(options.overrides, out="preview.png")
    config = compose_config(rest)
    seen = preview(_data(config))
    print(seen.text)
    print(f"\n{seen.picture.save(own['out'])}")


def _check(options: argparse.Namespace) -> int:
    own, rest = _own(options.overrides, workers="")
    if own["workers"] and not own["workers"].isdecimal():
        raise ValueError(f"workers must be a whole number, but got {own['workers']!r}.")
    config = compose_config(rest)
    if "on_error" in config.data:
        config.data.on_error = "raise"  # all files are wanted: the list is made here
    found = check(_data(config), workers=int(own["workers"]) if own["workers"] else None)
    print(found.text)
    return 0 if found.fine else _BROKEN


def _encode(options: argparse.Namespace) -> None:
    from diffaug.commands.encode import encode

    defaults = {"dtype": "float32", "allow_rounding": "false", "variants": "identity"}
    own, rest = _own(options.overrides, out=None, keep=None, **defaults)
    if own["out"] is None:
        raise ValueError("encode wants out=FOLDER, where the store is to be.")
    config = compose_config([*rest, "callbacks=none", "logger=none"])
    keep = None if own["keep"] is None else _listed(own["keep"])
    allow = choice("allow_rounding", own["allow_rounding"], ("true", "false")) == "true"
    quieten(config.lightning.diffaug)
    config.trainer.enable_checkpointing = False
    if "timeout" in (config.trainer.strategy if isinstance(config.trainer.strategy, DictConfig) else ()):
        config.trainer.strategy.timeout.minutes = _A_DAY  # a rank waits at the end for one that has a shard more
    module = get_class(f"{config.lightning.diffaug}.Encoding")
    rows = {"keep": keep, "dtype": own["dtype"], "allow_rounding": allow, "variants": _listed(own["variants"])}
    encode(_data(config), own["out"], instantiate(config.trainer), module, **rows)


def _listed(words: str) -> list[str]:
    return [word for word in words.strip("[]").replace(" ", "").split(",") if word]


def _export(options: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from diffaug.commands.export import export, find_run, load_weights, write_usage

    own, rest = _own(options.overrides, ckpt=None, out=None)
    if rest or None in own.values():
        raise ValueError("export wants ckpt=RUN (the folder that train.py left) and out=FOLDER, and nothing else.")
    run, file = find_run(own["ckpt"])
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    config.folder = str(run)
    model = instantiate(config.model, process=instantiate(config.process))
    load_weights(model, file)
    pipeline = export(model, own["out"], tuple(config.data.image_shape or ()))
    print(f"{own['out']} holds a {type(pipeline).__name__}. To sample from it, without diffaug:\n")
    print(write_usage(pipeline, own["out"]))


def _own(overrides: Sequence[str], **defaults: Any) -> tuple[dict[str, Any], list[str]]:
    """Split off the command's own key=value pairs, and return them and what is left for Hydra."""
    own, rest = dict(defaults), []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in defaults:
            own[key] = value
        else:
            rest.append(override)
    return own, rest


if __name__ == "__main__":
    sys.exit(main())
