"""The settings of all steps in one file: a set of clips, such as `configs/curate/mix.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import ConfigError, SectionType, require
from selfforcing_dfd.curate.assemble import PackSettings
from selfforcing_dfd.curate.cluster import ClusterSettings
from selfforcing_dfd.curate.embed import EmbedSettings
from selfforcing_dfd.curate.pick import PickSettings
from selfforcing_dfd.stages.config_files import check_ranges, explained

SETS = "configs/curate"


@dataclass(frozen=True)
class Settings:
    """about: what the set is, in words."""

    about: str = ""
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    pick: PickSettings = field(default_factory=PickSettings)
    pack: PackSettings = field(default_factory=PackSettings)


def load_settings(name: str) -> Settings:
    """Those of `configs/curate/NAME.yaml` or of a path; defaults where nothing is named.

    Raises ConfigError with the file and the wrong key.
    """
    settings: Any = OmegaConf.structured(Settings)
    if name:
        path = find_set(name)
        with explained(str(path)):
            own = OmegaConf.load(path)
            require(OmegaConf.is_dict(own), "the file holds a list; a set has sections")
            settings = OmegaConf.merge(settings, own)
    return checked_settings(settings, name)


def changed(section: SectionType, name: str, options: Mapping[str, Any]) -> SectionType:
    """A section with some values replaced. Raises ConfigError for one out of its range."""
    found = replace(section, **options)  # type: ignore[type-var]
    check_ranges(type(found), asdict(found), name)  # type: ignore[call-overload]
    return found


def checked_settings(settings: Any, name: str) -> Settings:
    with explained(name or "settings"):
        for section, kind in SECTIONS.items():
            check_ranges(kind, settings[section], section)
        found: Any = OmegaConf.to_object(settings)
    assert isinstance(found, Settings)
    return found


SECTIONS: dict[str, type] = {
    "embed": EmbedSettings,
    "cluster": ClusterSettings,
    "pick": PickSettings,
    "pack": PackSettings,
}


def find_set(name: str) -> Path:
    path = Path(name) if name.endswith(".yaml") else shipped(SETS) / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in shipped(SETS).glob("*.yaml")))
        raise ConfigError(f"there is no set {name}; use one of {known}, or a path to a .yaml file")
    return path
