"""Blocks that stay in the host's memory and visit the device in groups, in the order they run.

The device has two rooms, each of the size of the largest group. While one group runs, the next one
is copied into the other room, on a stream of its own and from pinned memory. After the last group
comes the first one, for the next call. Without a GPU the same copies are made, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from selfforcing_dfd.common import UserError

ALIGNED = 256  # bytes: where a tensor begins in a room, as torch's own allocations do
NUM_ROOMS = 2


class OffloadError(UserError):
    """Groups that would save no memory; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a block in a group's memory. point: makes the block use another tensor."""

    point: Callable[[Tensor], None]
    start: int
    like: Tensor  # on the meta device

    @property
    def stop(self) -> int:
        return self.start + self.like.nbytes

    def of(self, memory: Tensor) -> Tensor:
        """The tensor in the bytes of a group."""
        own = memory[self.start : self.stop]
        return own.view(self.like.dtype).view(self.like.shape)


@dataclass(slots=True)
class Group:
    """Blocks that move together. host: their bytes in the host's memory; room: None while there."""

    places: list[Place]
    host: Tensor
    room: Tensor | None = None

    def point_to(self, room: Tensor | None) -> None:
        """From now on the blocks use what lies in the room; None: in the host's memory."""
        self.room = room
        memory = self.host if room is None else room
        for place in self.places:
            place.point(place.of(memory))


@dataclass(slots=True)
class BlockGroups:
    """The blocks of a network, of which two groups at a time are on the device.

    Call `need` before a block runs. blocks: frozen; what else the network has, the caller moves.
    group_size: blocks of a group. Raises OffloadError where two groups are all there is.
    """

    blocks: Sequence[nn.Module]
    device: torch.device
    group_size: int = 1
    groups: list[Group] = field(init=False)
    rooms: list[Tensor] = field(init=False)
    present: int = field(init=False, default=-1)
    copying: torch.cuda.Stream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        parts = [
            self.blocks[start : start + self.group_size]
            for start in range(0, len(self.blocks), self.group_size)
        ]
        if len(parts) <= NUM_ROOMS:
            raise OffloadError(
                f"{len(self.blocks)} blocks in groups of {self.group_size} are {len(parts)}, and "
                f"{NUM_ROOMS} are on the device at a time: use smaller groups, or leave --offload "
                "out"
            )
        on_gpu = self.device.type == "cuda"
        self.groups = gathered([plan_group(part, self.device) for part in parts], on_gpu)
        size = max(group.host.nbytes for group in self.groups)
        self.rooms = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(NUM_ROOMS)
        ]
        self.copying = torch.cuda.Stream(self.device) if on_gpu else None

    @property
    def device_bytes(self) -> int:
        """Memory of the rooms, whatever the number of blocks."""
        return sum(room.nbytes for room in self.rooms)

    def need(self, block: int) -> None:
        """Have a block's weights on the device before what is queued next there runs.

        The next group's are on their way from here on.
        """
        number = block // self.group_size
        if number == self.present:
            return
        self.fetch(number)
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self.present = number
        self.fetch((number + 1) % len(self.groups))

    def fetch(self, number: int) -> None:
        """Start to copy a group into the room that the present group is not in."""
        group = self.groups[number]
        if group.room is not None:
            return
        in_use = self.groups[self.present].room if self.present >= 0 else None
        room = next(room for room in self.rooms if room is not in_use)
        for other in self.groups:
            if other.room is room:
                other.point_to(None)
        if self.copying is None:
            room[: group.host.nbytes].copy_(group.host)
        else:
            # the room's last group may still be computing
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copying):
                room[: group.host.nbytes].copy_(group.host, non_blocking=True)
        group.point_to(room)


def gathered(planned: list[list[tuple[Place, Tensor]]], pinned: bool) -> list[Group]:
    """Groups in the host's memory, to which the blocks point from now on.

    All are in one allocation: torch rounds pinned ones up to a power of two.
    """
    sizes = [aligned(group[-1][0].stop) for group in planned]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    groups = []
    for part, host in zip(planned, whole.split(sizes), strict=True):
        group = Group([place for place, _ in part], host)
        for place, tensor in part:
            place.of(host).copy_(tensor)
        group.point_to(None)
        groups.append(group)
    return groups


def plan_group(blocks: Sequence[nn.Module], device: torch.device) -> list[tuple[Place, Tensor]]:
    """The blocks' tensors, and their places one after the other."""
    planned: list[tuple[Place, Tensor]] = []
    start = 0
    for block in blocks:
        for point, tensor in movable(block, device):
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            planned.append((Place(point, start, like), tensor))
            start = aligned(start + like.nbytes)
    return planned


def aligned(num_bytes: int) -> int:
    """The next number of bytes at which a tensor may begin."""
    return -(-num_bytes // ALIGNED) * ALIGNED


@runtime_checkable
class Wrapping(Protocol):
    """A tensor that is made of several, such as torchao's, in torch's own terms."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]: ...

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> Self: ...


def movable(
    module: nn.Module, device: torch.device
) -> Iterator[tuple[Callable[[Tensor], None], Tensor]]:
    """Each tensor of a module, with the function that puts another one in its place.

    A tensor that is made of several is said to be on the device, and these are moved.
    """
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers("", False)]:
            if not isinstance(tensor, Wrapping):
                yield partial(setattr, tensor, "data"), tensor.data
                continue
            names, _ = tensor.__tensor_flatten__()
            setattr(part, name, nn.Parameter(empty_on(device, tensor), requires_grad=False))
            for inner in names:
                yield partial(setattr, getattr(part, name), inner), getattr(tensor, inner)


def stored(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that it is made of."""
    if not isinstance(tensor, Wrapping):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def empty_on(device: torch.device, tensor: Any) -> Tensor:
    """A tensor like one that is made of several, on a device, where it takes no memory."""
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    inner = {
        name: torch.empty((1,) * part.ndim, dtype=part.dtype, device=device).expand(part.shape)
        for name, part in parts.items()
    }
    whole: Tensor = tensor.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return whole
