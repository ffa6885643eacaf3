"""python -m diffaug report | plot | preview | check | encode | export: look before you train, take it along afterwards.

report [group=choice] [key=value ...]       a recipe in numbers: schedule, terminal SNR, prior KL, what it trains on
report --all                                every schedule of the package, a line each
plot schedules NAME ... [out=...]           beta, alpha_bar, alpha and sigma, log-SNR over time
plot recipes EXPERIMENT ... [out=...]       what recipes train on: share of the draws and of the loss over log-SNR
plot strip NAME ... [data=...] [out=...]    one image from x_0 to x_T under several schedules [sizes=16,64]
plot parts LAW ... parts=... [out=...]      a clip, or images, noised part by part under several laws
plot levels FOLDER_OR_CSV [out=...]         loss by noise level, as a run with callbacks=loss_by_level left it
preview [group=choice] ... [out=...]        your own data through the whole pipe: values, noised strip, times, warnings
check [data=...] [workers=N]                every image of the dataset read; which are broken, for data.on_error=skip
                                            (exit status 3 where any is, or is not known)
encode [data=...] out=FOLDER [keep=label]   the dataset decoded once, into a store for data=store data.root=FOLDER
                                            [trainer=ddp trainer.devices=8]; run again, it goes on; latents, with
                                            encoder@data.encoder=autoencoder_kl [dtype=float32 or float16, bfloat16]
                                            [variants=identity,hflip]: each encoded, one drawn at every visit;
                                            variants=8: so many draws of a data.transform that is random;
                                            differ=NAME: a part whose length differs, stored without padding;
                                            pixels=true: the images beside their latents;
                                            update=true makes the rows of files that have changed, keeps the others
export ckpt=RUN out=FOLDER [vae=FOLDER]     a trained run as a diffusers pipeline folder; of latents, with its VAE

out= is a .png, .svg or .pdf file; the numbers of a picture go beside it as .csv. A NAME may carry overrides of its own:
cosine,schedule.timesteps=4000.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diffaug import plots
from diffaug.checks import choice
from diffaug.commands.check import check
from diffaug.commands.plot import first_image, first_images, read_levels, write_label
from diffaug.commands.preview import preview
from diffaug.commands.report import page, table
from diffaug.config import compose_config, schedule_names
from diffaug.process import ForwardProcess
from diffaug.schedules import Schedule
from diffaug.training.errors import Told, sentence
from diffaug.training.quiet import quieten

_A_DAY = 24 * 60  # in minutes
_BROKEN = 3  # the exit status of a check that found broken images, or could not look; 1 is an error's, 2 no command's
_T = TypeVar("_T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status.

    A word ``key=value`` whose key is a parameter of the command is its own; the others are Hydra's overrides.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    name = " ".join(words[: 2 if words[0] == "plot" else 1])
    command = _COMMANDS.get(name)
    if command is None:
        print(f"python -m diffaug: there is no {name!r}, only {', '.join(_COMMANDS)}.", file=sys.stderr)
        return 2
    own: dict[str, str] = {}
    overrides: list[str] = []
    for word in words[len(name.split()) :]:
        key, equals, value = word.partition("=")
        if equals and key in (command.__kwdefaults__ or ()):
            own[key] = value
        else:
            overrides.append(word)
    try:
        usual: str = (command.__kwdefaults__ or {}).get("out", "")
        _check_out(own.get("out", usual), picture=usual.endswith(".png"))
        return command(overrides, **own) or 0
    except (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"python -m diffaug {name}: {sentence(error) or f'{error}{where}'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"python -m diffaug {name}: interrupted. {error}".rstrip(), file=sys.stderr)
        return 128 + (error.number if isinstance(error, Told) else signal.SIGINT)


def _check_out(out: str, picture: bool) -> None:
    """Refuse an ``out=`` that cannot be written, before the work that it is for."""
    if picture:
        plots.check_path(out)
    if not out:
        return
    path = Path(out).expanduser().absolute()
    there = next(folder for folder in (path.parent if picture else path, *path.parents) if folder.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error.strerror}: {there}.") from None


def _report(overrides: list[str]) -> None:
    if "--all" in overrides:
        overrides.remove("--all")
        each = [f"+schedule@all.{name}={name}" for name in schedule_names()]
        configs = compose_config([*overrides, *each])["all"]
        print(table({name: instantiate(config) for name, config in configs.items()}))
    else:
        print(page(_process(overrides)))


def _plot_schedules(overrides: list[str], *, out: str = "schedules.png") -> None:
    print(plots.schedules(_each("schedule", overrides, _schedule)).save(out))


def _plot_recipes(overrides: list[str], *, out: str = "recipes.png", loss: str = "F") -> None:
    print(plots.recipes(_each("experiment", overrides, _process), loss=loss).save(out))


def _plot_strip(overrides: list[str], *, out: str = "strip.png", sizes: str = "") -> None:
    if not all(size.isdecimal() and int(size) for size in _listed(sizes)):
        raise ValueError(f"sizes must be whole numbers >= 1, such as sizes=16,64, but got {sizes!r}.")
    schedules = _each("schedule", overrides, _schedule)
    image = first_image(_data(compose_config(_split_names(overrides)[1])))
    print(plots.strip(schedules, image, sizes=[int(size) for size in _listed(sizes)]).save(out))


def _plot_parts(overrides: list[str], *, out: str = "parts.png") -> None:
    config = compose_config(_split_names(overrides)[1])
    if config.process.get("parts") is None:
        raise ValueError("plot parts needs parts=frames or patches (or experiment=diffusion_forcing).")
    fields = "process.fields=[x_t,x_0,t,log_snr]"
    named = _each("part_law@process.parts.law", [*overrides, fields], _process)
    print(plots.parts(named, first_images(_data(config))).save(out))


def _plot_levels(names: list[str], *, out: str = "levels.png") -> None:
    if len(names) != 1:
        raise ValueError("plot levels wants one name: the folder of a run, or its loss_by_level.csv.")
    print(plots.levels(read_levels(names[0])).save(out))


def _each(group: str, words: list[str], make: Callable[[list[str]], _T]) -> dict[str, _T]:
    """Make what each name of a group stands for, under its label; the words that are no names go to all."""
    names, common = _split_names(words)
    if not names:
        raise ValueError("plot wants at least one name; python -m diffaug --help shows the forms.")
    return {write_label(name, group): make([*common, *f"{group}={name}".split(",")]) for name in names}


def _split_names(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the names among some words, which may have overrides of their own, and the other words."""
    names = [word for word in words if "=" not in word.split(",")[0]]
    return names, [word for word in words if word not in names]


def _schedule(overrides: list[str]) -> Schedule:
    return instantiate(compose_config(overrides).schedule)


def _process(overrides: list[str]) -> ForwardProcess:
    return instantiate(compose_config(overrides).process)


def _data(config: DictConfig) -> Any:
    import_module(config.lightning.diffaug)  # what is missing is said in its own words
    return instantiate(config.data)


def _preview(overrides: list[str], *, out: str = "preview.png") -> None:
    seen = preview(_data(compose_config(overrides)))
    print(f"{seen.text}\n\n{seen.picture.save(out)}")
    if seen.buckets is not None:
        path = Path(out)
        print(seen.buckets.save(path.with_name(f"{path.stem}_buckets{path.suffix}")))


def _check(overrides: list[str], *, workers: str = "") -> int:
    if workers and not workers.isdecimal():
        raise ValueError(f"workers must be a whole number >= 0, but got {workers!r}.")
    config = compose_config(overrides)
    if "on_error" in config.data:
        config.data.on_error = "raise"  # all files are wanted: the list is made here
    if "buckets" in config.data:
        config.data.buckets = config.data.image_shape = None  # buckets would want all sizes first
    found = check(_data(config), workers=int(workers) if workers else None)
    print(found.text)
    return 0 if found.fine else _BROKEN


def _encode(
    overrides: list[str],
    *,
    out: str = "",
    keep: str | None = None,
    dtype: str = "float32",
    allow_rounding: str = "false",
    variants: str = "identity",
    differ: str = "",
    pixels: str = "false",
    update: str = "false",
) -> None:
    from diffaug.commands.encode import encode

    if not out:
        raise ValueError("encode wants out=FOLDER, where the store is to be.")
    config = compose_config([*overrides, "callbacks=none", "logger=none"])
    flags = {"allow_rounding": allow_rounding, "pixels": pixels, "update": update}
    given = {name: choice(name, value, ("true", "false")) == "true" for name, value in flags.items()}
    quieten(config.lightning.diffaug)
    config.trainer.enable_checkpointing = False
    if "timeout" in (config.trainer.strategy if isinstance(config.trainer.strategy, DictConfig) else ()):
        config.trainer.strategy.timeout.minutes = _A_DAY  # a rank waits at the end for one that has a shard more
    module = get_class(f"{config.lightning.diffaug}.Encoding")
    rows = {
        "keep": None if keep is None else _listed(keep),
        "variants": int(variants) if variants.isdecimal() else _listed(variants),
        "differ": _listed(differ),
    }
    trainer = instantiate(config.trainer)
    encode(_data(config), out, trainer, module, dtype=dtype, **given, **rows)


def _listed(words: str) -> list[str]:
    return [word for word in words.strip("[]").replace(" ", "").split(",") if word]


def _export(overrides: list[str], *, ckpt: str = "", out: str = "", vae: str | None = None) -> None:
    from omegaconf import OmegaConf

    from diffaug.commands.export import export, find_run, load_weights, write_usage
    from diffaug.encoding.autoencoder import find_autoencoder, latent_shape, recipe_in

    if overrides or not ckpt or not out:
        raise ValueError(
            "export wants ckpt=RUN (the folder that train.py left) and out=FOLDER, of latents also vae=FOLDER where "
            "the autoencoder is no longer where it was, and nothing else."
        )
    run, file = find_run(ckpt)
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    config.folder = str(run)
    model = instantiate(config.model, process=instantiate(config.process))
    checkpoint = load_weights(model, file)
    shape, latents = tuple(config.data.image_shape or ()), {}
    if model.latents:
        recipe = recipe_in(checkpoint)
        latents["autoencoder"] = found = find_autoencoder(recipe, config.data, vae, instantiate)
        latents["latent_stats"] = recipe["latent_stats"]
        shape = latent_shape(found, shape) if config.data.get("encoder") else shape
    pipeline = export(model, out, shape, **latents)
    print(f"{out} holds a {type(pipeline).__name__}. To sample from it, without diffaug:\n")
    print(write_usage(pipeline, out))


_COMMANDS: dict[str, Callable[..., int | None]] = {
    "report": _report,
    "plot schedules": _plot_schedules,
    "plot recipes": _plot_recipes,
    "plot strip": _plot_strip,
    "plot parts": _plot_parts,
    "plot levels": _plot_levels,
    "preview": _preview,
    "check": _check,
    "encode": _encode,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(main())
