"""The page that ``--help`` prints: groups with their choices, and every key with its value and comment."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

_USAGE = (
    ("{script} [group=choice ...] [key=value ...]", "one run"),
    ("{script} -m key=value,other ...", "a sweep: one run for each value"),
    ("{script} -m hydra/launcher=slurm ...", "likewise, each run a job of a cluster; local: of this machine"),
    ("{script} group=choice --help", "this page, for other choices"),
    ("{script} --hydra-help", "Hydra's own options"),
    ("python -m diffaug --help", "look at a recipe, take a trained run along"),
)

Keys = tuple[str, ...]


def page(*, _root_: DictConfig) -> str:
    """Write the page of help for a composed config, as the template of Hydra's help: every dollar sign doubled.

    Arguments:
        _root_: the config with its ``hydra`` node, which OmegaConf hands to a resolver.
    """
    hydra = _root_.hydra
    loader: Any = GlobalHydra.instance().config_loader()
    script = f"python {hydra.job.name}.py"
    lines = [f"{command.format(script=script):56}{what}" for command, what in _USAGE]
    lines.append("\nGroups, each with its choice and what else it may be:\n")
    for key, chosen in reversed(hydra.runtime.choices.items()):
        group = key.partition("@")[0]
        if not group.startswith("hydra/"):
            others = ", ".join(name for name in loader.get_group_options(group) if name != chosen)
            line = f"{key}={chosen or 'null'}" + (f": {others}" if others else "")
            lines.append(fill(line, 118, initial_indent="  ", subsequent_indent="      "))
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    composed = loader.compute_defaults_list(hydra.job.config_name, overrides, RunMode.RUN).defaults
    comments: dict[Keys, str] = {}
    for part in composed:
        package = tuple(part.package.split(".")) if part.package else ()
        text = _text(loader, part.config_path)
        comments |= {(*package, *path): comment for path, comment in comments_of(text).items()}
    config = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    lines += ["\nKeys of these choices, each with its value:\n", write_comments(OmegaConf.to_yaml(config), comments)]
    return "\n".join(lines).replace("$", "$$")


def _text(loader: Any, config_path: str) -> str:
    """Read the file of a config, from the first folder of the search path that has it; nothing of Hydra's own."""
    for source in () if config_path.startswith("hydra/") else loader.get_sources():
        file = Path(source.path, f"{config_path}.yaml")
        if source.scheme() == "file" and file.is_file():
            return file.read_text()
    return ""


def comments_of(text: str) -> dict[Keys, str]:
    """Collect the comments of a YAML file, by the path of their key; under the empty path that of the file."""
    lines = text.splitlines()
    found = {}
    for line in lines:
        head = line.removeprefix("#").strip()
        if not line.startswith("#"):
            break
        if not head.startswith("@package"):
            found[()] = head
    for path, line, column in _keys(yaml.compose(text), ()):
        comment = lines[line][column:].partition("#")[2].strip()
        if comment:
            found[path] = comment
    return found


def write_comments(text: str, comments: dict[Keys, str]) -> str:
    """Write YAML with a comment behind each key that has one."""
    lines = text.splitlines()
    for path, line, _ in _keys(yaml.compose(text), ()):
        if comments.get(path):
            lines[line] += f"  # {comments[path]}"
    return "\n".join(lines)


def _keys(node: yaml.Node | None, above: Keys) -> Iterator[tuple[Keys, int, int]]:
    """List every key on a line of its own: its path, its comment's line, and the column where that may begin."""
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return
    for key, value in node.value:
        path = (*above, key.value)
        ends = value if isinstance(value, yaml.ScalarNode) or value.flow_style else key
        yield path, ends.end_mark.line, ends.end_mark.column
        yield from _keys(value, path)
