"""diffusers' autoencoders: loaded as encoders; found for a run's export, and checked to have made its latents."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffaug.checks import choice
from diffaug.datamodules.recipe import describe
from diffaug.encoding.fingerprint import digest_weights
from diffaug.store.layout import INFO
from diffaug.store.moments import Moments

KINDS = ("AutoencoderKL", "AutoencoderTiny")


def load_autoencoder(kind: str, folder: str) -> Any:
    """Load one of diffusers' autoencoders from a folder of this machine, or from that of a pipeline with one.

    Arguments:
        kind: the class of diffusers, one of `KINDS`.
        folder: what its ``save_pretrained`` wrote. Nothing is fetched.

    Raises:
        FileNotFoundError: there is none.
    """
    found = _folders(choice("data.encoder.kind", kind, KINDS), folder)
    if not found:
        where = Path(folder).expanduser().resolve()
        raise FileNotFoundError(
            f"data.encoder.folder={folder!r} holds no {kind}: there is no config.json of one in {where}, nor in a "
            "folder of it. Nothing is fetched: save one there by its save_pretrained."
        )
    return _load(kind, found[0])


def folder_of(encoder: Any) -> str | None:
    """Return the folder that a diffusers autoencoder was loaded from, for store.json; None of anything else."""
    name = encoder.config.get("_name_or_path") if type(encoder).__name__ in KINDS else None
    return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().is_dir() else None


def recipe_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of the data that a checkpoint was trained on; empty where it holds none."""
    states = [state for state in checkpoint.values() if isinstance(state, Mapping) and "recipe" in state]
    return states[0]["recipe"] if states else {}


def find_autoencoder(recipe: Mapping[str, Any], data: Mapping[str, Any], given: str | None, make: Any) -> Any:
    """Load the autoencoder whose latents a run was trained on.

    Arguments:
        recipe: of the data, in the run's checkpoint.
        data: the run's configuration of it.
        given: its folder; None looks where the run's encoder, or its store's, was.
        make: called with the configuration of a run's live encoder.

    Raises:
        ValueError: the encoder was not a diffusers autoencoder, or what is found has other weights.
        FileNotFoundError: it is not where it was.
    """
    parts = [part for key, part in recipe.items() if key.startswith("train") and isinstance(part, Mapping)]
    store: Mapping[str, Any] | None = next((part for part in parts if part.get("weights")), None)
    encoder: str | None = (store or recipe).get("encoder")
    kind = str(encoder).split(" of ")[0]
    if kind not in KINDS:
        raise ValueError(
            f"This network makes latents of {encoder or 'a dataset of latents'}, which is not a diffusers "
            f"{' or '.join(KINDS)} as it is, so how a pipeline would decode them is not known. In Python, "
            "diffaug.commands.export.export takes the autoencoder= and the latent_stats= that apply."
        )
    if store is None and given is None:
        return _known(make(data["encoder"]), encoder, None, "data.encoder")
    folder = given if given is not None else _noted(str(data.get("root")))
    faults = []
    for path in _folders(kind, folder):
        vae = _load(kind, path)
        try:
            return _known(vae, encoder, store["weights"] if store else None, str(path))
        except ValueError as error:
            faults.append(error)
    if faults:
        raise faults[0]
    raise FileNotFoundError(f"{folder} holds no {kind}: say where the one that made the latents is, vae=FOLDER.")


def latent_shape(vae: Any, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what an autoencoder makes of an image."""
    with torch.no_grad():
        out = vae.encode(torch.zeros(1, *image_shape, dtype=vae.dtype))
    return tuple(Moments.of(out, 1).mean.shape[1:])


def _noted(root: str) -> str:
    path = Path(root).expanduser() / INFO
    folder = json.loads(path.read_text()).get("autoencoder") if path.is_file() else None
    if folder is None:
        raise FileNotFoundError(f"{path} does not say where the autoencoder is that made its latents: vae=FOLDER.")
    return folder


def _folders(kind: str, folder: str) -> list[Path]:
    """List the folders that hold such an autoencoder: this one, and those of the parts of a pipeline."""
    root = Path(folder).expanduser()
    configs = [path / "config.json" for path in (root, *sorted(root.glob("*/")))]
    return [
        config.parent
        for config in configs
        if config.is_file() and json.loads(config.read_text())["_class_name"] == kind
    ]


def _load(kind: str, path: Path) -> Any:
    import diffusers

    return getattr(diffusers, kind).from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)


def _known(vae: Any, encoder: str | None, weights: str | None, where: str) -> Any:
    """Return an autoencoder, in the dtype that it was used in, or refuse another one."""
    dtypes = [] if weights is None else [torch.float16, torch.bfloat16]
    for made in (vae, *(copy.deepcopy(vae).to(dtype) for dtype in dtypes)):
        if describe(made) == encoder and weights in (None, digest_weights(made)):
            return made
    made = f"{describe(vae)}, with weights {digest_weights(vae)}"
    raise ValueError(
        f"{where} is {made}, but the latents are of {encoder}, with weights {weights}: give the folder "
        "of that one, vae=FOLDER."
    )
