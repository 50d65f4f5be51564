"""All kinds of things that are attacked, and how much of the time each gets."""

from __future__ import annotations

from tests.attack.clips import Clips
from tests.attack.configs import Configs
from tests.attack.runs import Runs, Trainings
from tests.attack.server import Server
from tests.attack.shards import Shards
from tests.attack.tars import Tars
from tests.attack.trials import Kind
from tests.attack.weights import Weights

KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Configs, Weights, Shards, Tars, Clips, Runs, Trainings, Server)
}
SHARES = dict.fromkeys(KINDS, 1.0) | {"runs": 2.0, "trainings": 1.5}
