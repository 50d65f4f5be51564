"""Where one function is applied to many inputs: here, in processes of this machine, on a cluster.

Results are the same in each place, and come in the inputs' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from selfforcing_dfd.processes.local import each_in_order

Kind = Literal["local", "ray"]

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Engine:
    """num_processes: that work at once; None on a cluster: as many as it has cores or GPUs for.
    address: of a Ray cluster; empty: one of this machine, for as long as the work takes. gpus: of a
    cluster, for each process. start_method: of processes of this machine.
    """

    kind: Kind = "local"
    num_processes: int | None = 1
    address: str = ""
    gpus: float = 0.0
    start_method: str = "spawn"

    @property
    def is_here(self) -> bool:
        """Whether this process does all the work."""
        return self.kind == "local" and self.num_processes == 1

    def each_in_order(
        self, make: Callable[[Given], Made], inputs: Iterable[Given]
    ) -> Iterator[Made]:
        """`make` of each input, in their order. make: picklable, unless all is done here.

        UserError where a process is killed, and on a cluster that cannot be reached.
        """
        if self.kind == "local":
            return each_in_order(make, inputs, self.num_processes or 1, self.start_method)
        from selfforcing_dfd.processes.cluster import each_on_cluster

        return each_on_cluster(
            make, inputs, self.num_processes, address=self.address, gpus=self.gpus
        )


HERE = Engine()


def in_processes(number: int, start_method: str = "spawn") -> Engine:
    """Processes of this machine."""
    return Engine("local", number, start_method=start_method)
