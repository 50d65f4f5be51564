"""From YAML files and dotlist overrides to a `Config`, and back. `stages.load_config` knows all
sections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, ConfigError, SectionType, require

OWN_SECTIONS = {name: kind for name, kind in get_type_hints(Config).items() if name != "stage"}


def load(
    name: str, overrides: list[str] | tuple[str, ...], stage_sections: Mapping[str, type]
) -> Config:
    """Settings of the file `name` (and of its `base`), with overrides such as `dfd.p=0.3` on top.

    Raises ConfigError with the file and the full path of an unknown key, a wrong type or a value
    out of its range.
    """
    with explained(name):
        schema = {key: kind() for key, kind in stage_sections.items()}
        tree = merged(_open(Config(stage=schema)), _layers(name))
        return _config(tree, overrides, schema)


def change(config: Config, overrides: list[str]) -> Config:
    """The same settings with dotlist overrides on top. Raises ConfigError like `load`."""
    with explained(config.run.name):
        return _config(_open(config), overrides, config.stage)


def typed(path: Path, kind: type[SectionType]) -> SectionType:
    """The sections of a YAML file as a dataclass `kind`; those without a default must be there.

    Raises ConfigError, and OmegaConf's errors: use it within `explained`.
    """
    own = OmegaConf.load(path)
    what = kind.__name__.lower()
    require(OmegaConf.is_dict(own), f"the file holds a list; a {what} has sections")
    tree = OmegaConf.merge(OmegaConf.structured(kind), own)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(tree))
    require(not missing, f"{', '.join(missing)} is not set; write it into the file")
    sections: Any = OmegaConf.to_object(tree)
    return sections


def _open(config: Config) -> Any:
    """The settings as one OmegaConf tree that knows every section's types."""
    tree: Any = OmegaConf.create({})
    for key in OWN_SECTIONS:
        value = vars(config)[key]
        tree[key] = OmegaConf.structured(value) if dataclasses.is_dataclass(value) else value
    for key, section in config.stage.items():
        tree[key] = OmegaConf.structured(section)
    OmegaConf.set_struct(tree, True)
    OmegaConf.set_struct(tree.arms, False)
    OmegaConf.set_struct(tree.report.gate, False)
    return tree


def _config(
    tree: Any, overrides: list[str] | tuple[str, ...], stage_sections: Mapping[str, Any]
) -> Config:
    for override in overrides:
        require("=" in override, f"override {override!r} is not of the form section.setting=value")
    # an empty value is an empty text, not None
    dotlist = [f"{override}''" if override.endswith("=") else override for override in overrides]
    tree = merged(tree, OmegaConf.from_dotlist(dotlist))
    for key in tree:
        kind = OmegaConf.get_type(tree, key)
        if kind is not None and dataclasses.is_dataclass(kind):
            check_ranges(kind, tree[key], str(key))
    values = {str(key): _plain(tree[key]) for key in tree}
    check_sections(values, {key: type(section) for key, section in stage_sections.items()})
    stage = {key: values.pop(key) for key in stage_sections}
    return Config(**values, stage=stage)


def check_sections(values: Mapping[str, Any], of_stages: Mapping[str, type]) -> None:
    """Raise ConfigError for a section that `${...}` made one value."""
    for key, kind in {**OWN_SECTIONS, **of_stages, "arms": dict}.items():
        is_section = kind is dict or dataclasses.is_dataclass(kind)
        require(
            not is_section or isinstance(values[key], kind),
            f"{key} is {values[key]!r}; it must be a section that holds settings by name",
        )


def merged(settings: Any, others: Any) -> Any:
    """The settings with others on top. Raises ValueError where a list should become a section."""
    try:
        return OmegaConf.merge(settings, others)
    except TypeError as error:
        raise ValueError(f"{error}: a list and a section cannot replace each other") from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def check_ranges(section: type, values: Any, path: str) -> None:
    """Raise ConfigError for the first number of a section that leaves its range."""
    kinds = get_type_hints(section)
    for setting in dataclasses.fields(section):
        name = f"{path}.{setting.name}"
        value = values[setting.name]
        if dataclasses.is_dataclass(kinds[setting.name]):
            check_ranges(kinds[setting.name], value, name)
        elif "range" in setting.metadata:
            for number in value if OmegaConf.is_config(value) else [value]:
                setting.metadata["range"].check(name, number)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn errors of OmegaConf and of our checks into ConfigError with the file's name."""
    try:
        yield
    except (OmegaConfBaseException, ValueError, OverflowError) as error:
        reason = str(error).split("\n    full_key")[0]
        reason = reason.replace("is not in struct", "is no section of a config")
        path = getattr(error, "full_key", None)
        raise ConfigError(f"{name}: {f'{path}: ' if path else ''}{reason}") from error


def find_config(name: str) -> Path:
    """The config file of that name (`.yaml` may be left out), in this folder or in `configs/`.

    Raises ConfigError with the names of the shipped ones.
    """
    configs = shipped("configs")
    for path in (Path(name), configs / name, Path(f"{name}.yaml"), configs / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(training_configs())
    raise ConfigError(f"no config file {name}, neither here nor in configs/; there are {known}")


def training_configs() -> dict[str, Path]:
    """The shipped configs of training runs, by the name that `--config` takes."""
    configs = shipped("configs")
    files = {path.relative_to(configs).as_posix(): path for path in sorted(configs.rglob("*.yaml"))}
    others = ("curate/", "protocol/", "stream/", "study/")
    return {name: files[name] for name in files if not name.startswith(others)}


def _layers(name: str, seen: tuple[Path, ...] = ()) -> Any:
    """The file's settings over those of its `base`, looked up beside it and then in `configs/`."""
    beside = seen[-1].parent / name if seen else Path(name)
    path = (beside if beside.is_file() else find_config(name)).resolve()
    require(path not in seen, f"base leads back to {name}; remove one `base:`")
    own: Any = OmegaConf.load(path)
    require(OmegaConf.is_dict(own), f"{path.name} holds a list; write sections such as `run: ...`")
    base = own.get("base")
    return merged(_layers(str(base), (*seen, path)), own) if base else own


def to_yaml(config: Config) -> str:
    """The resolved settings, loadable again anywhere: what came from `base` is in them."""
    return OmegaConf.to_yaml(_open(dataclasses.replace(config, base="")))
