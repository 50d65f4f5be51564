"""How two frames differ by movement: block matching, and the camera as a similarity.

Weight-free stand-ins for RAFT's flow (VBench's dynamic degree) and for a camera pose: they see
shifts, zoom and roll of the picture, and no parallax.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import degrees

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, unfold

BLOCK = 8  # cells
REACH = 6  # cells in each direction
WIDE = 1000  # pixels; wider frames have larger cells
FEWEST = 48  # cells on the shorter side, where the frame has as many pixels
PRIOR = 1e-3  # of a block's cost for each cell of displacement: a flat block stays where it is
EXACT = 1e-3  # of the costs around it: a shift that costs less is not refined
CAMERA_FITS = 4  # reweighted least squares
SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class Flow:
    """Displacement of blocks between two frames, in pixels of the full frame.

    moved: [N, 2], right and down. centres: [N, 2], x and y from the middle of the frame.
    """

    moved: Tensor
    centres: Tensor

    @property
    def length(self) -> Tensor:
        return self.moved.norm(dim=1)


@dataclass(frozen=True, slots=True)
class Camera:
    """The similarity that best explains a flow: shift in pixels, zoom - 1, turn in radians."""

    right: float
    down: float
    zoom: float
    turn: float


def shrink_of(height: int, width: int) -> int:
    """Pixels to a cell: 4, or 6 in wide frames, or fewer in small ones."""
    usual = 6 if width >= WIDE else 4
    return max(1, min(usual, min(height, width) // FEWEST))


def block_flow(before: Tensor, after: Tensor) -> Flow:
    """Exhaustive block matching of two luma frames [H, W], refined below a cell by a parabola.

    Squared differences of 8 x 8 cells over shifts of up to 6 cells. Blocks lie so far inside that
    every shift stays in the frame. ValueError for frames of fewer than 20 cells.
    """
    shrink = shrink_of(*before.shape)
    first, second = (cells(frame, shrink) for frame in (before, after))
    rows, columns = ((side - 2 * REACH) // BLOCK for side in first.shape)
    if rows < 1 or columns < 1:
        raise ValueError(f"frames of {tuple(before.shape)} are smaller than a block and its reach")
    top, left = (
        (side - n * BLOCK) // 2 for side, n in zip(first.shape, (rows, columns), strict=True)
    )
    blocks = first[top : top + rows * BLOCK, left : left + columns * BLOCK]
    around = second[
        top - REACH : top + rows * BLOCK + REACH, left - REACH : left + columns * BLOCK + REACH
    ]
    x, y = refined(matching_costs(blocks, around))
    moved = torch.stack([x, y], dim=-1).flatten(0, 1) * shrink
    return Flow(moved, block_centres(rows, columns, first.device) * (BLOCK * shrink))


def cells(frame: Tensor, shrink: int) -> Tensor:
    return avg_pool2d(frame[None, None], shrink)[0, 0]


def matching_costs(blocks: Tensor, around: Tensor) -> Tensor:
    """Mean squared difference of each block at each shift down and right.

    blocks: [h, w] cells, whole blocks; around: the other frame there, REACH more on all sides.
    Returns [rows, columns, 2 REACH + 1, 2 REACH + 1].
    """
    side = 2 * REACH + 1
    shifted = unfold(around[None, None], blocks.shape)[0].T.reshape(side, side, *blocks.shape)
    squared = (shifted - blocks).square()
    costs = squared.unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).mean(dim=(3, 5))
    costs = costs.permute(2, 3, 0, 1)
    places = torch.arange(side, device=blocks.device) - REACH
    distance = torch.hypot(places[:, None].float(), places[None].float())
    scale = costs[..., REACH, REACH].mean() + SMALL
    return costs + PRIOR * scale * distance


def refined(costs: Tensor) -> tuple[Tensor, Tensor]:
    """(right, down), each [rows, columns], in cells: the least cost, refined below a cell.

    A paraboloid goes through it and its eight neighbours. Two parabolas would not do: along an edge
    of the picture, an error in one direction moves the other. At the rim of the reach nothing is
    refined, and neither is a shift that fits exactly: round a corner costs rise more on one side,
    so that a paraboloid would move a picture that stands still.
    """
    side = costs.shape[-1]
    best = costs.flatten(2).argmin(-1)
    down, right = best // side, best % side
    inside = (down - REACH).abs().maximum((right - REACH).abs()) < REACH
    row, column = down.clamp(1, side - 2), right.clamp(1, side - 2)

    def at(below: int, beside: int) -> Tensor:
        place = (row + below) * side + column + beside
        return costs.flatten(2).gather(2, place[..., None])[..., 0]

    middle = at(0, 0)
    slope_x = (at(0, 1) - at(0, -1)) / 2
    slope_y = (at(1, 0) - at(-1, 0)) / 2
    bend_x = at(0, 1) - 2 * middle + at(0, -1)
    bend_y = at(1, 0) - 2 * middle + at(-1, 0)
    twist = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = bend_x * bend_y - twist.square()
    around = (at(0, 1) + at(0, -1) + at(1, 0) + at(-1, 0)) / 4
    inside &= middle > EXACT * around
    fits = inside & determinant.isfinite() & (determinant > SMALL) & (bend_x > 0)
    determinant = torch.where(fits, determinant, 1)
    x = torch.where(fits, (twist * slope_y - bend_y * slope_x) / determinant, 0)
    y = torch.where(fits, (twist * slope_x - bend_x * slope_y) / determinant, 0)
    return right - REACH + x.clamp(-1, 1), down - REACH + y.clamp(-1, 1)


def block_centres(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows * columns, 2]: x and y of each block from the middle, in blocks."""
    y, x = torch.meshgrid(
        torch.arange(rows, device=device) - (rows - 1) / 2,
        torch.arange(columns, device=device) - (columns - 1) / 2,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def fit_camera(flow: Flow) -> Camera:
    """Least squares of u = right + zoom x - turn y, v = down + zoom y + turn x, robust to objects.

    Blocks count the less the farther they are from the last fit.
    """
    x, y = flow.centres.double().unbind(1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.cat([torch.stack([one, zero, x, -y], 1), torch.stack([zero, one, y, x], 1)])
    wanted = flow.moved.double().T.flatten()
    weight = torch.ones(len(x), dtype=torch.float64)
    fit = torch.zeros(4, dtype=torch.float64)
    for _ in range(CAMERA_FITS):
        both = weight.repeat(2).sqrt()
        fit = torch.linalg.lstsq(rows * both[:, None], wanted * both, driver="gelsd").solution
        missed = (rows @ fit - wanted).unflatten(0, (2, -1)).norm(dim=0)
        weight = 1 / (1 + (missed / missed.median().clamp_min(SMALL)).square())  # Cauchy's
    right, down, zoom, turn = fit.tolist()
    return Camera(right, down, zoom, turn)


@dataclass(slots=True)
class CameraPath:
    """Cameras of frame pairs added up; lengths in units of the frame's width."""

    width: int
    path: float = 0.0
    x: float = 0.0
    y: float = 0.0
    log_zoom: float = 0.0
    zoomed: float = 0.0
    turned: float = 0.0

    def add(self, camera: Camera) -> None:
        right = camera.right / self.width
        down = camera.down / self.width
        log_zoom = float(torch.log(torch.tensor(max(1 + camera.zoom, SMALL), dtype=torch.float64)))
        self.path += (right**2 + down**2) ** 0.5
        self.x += right
        self.y += down
        self.log_zoom += log_zoom
        self.zoomed += abs(log_zoom)
        self.turned += abs(degrees(camera.turn))

    def numbers(self) -> dict[str, float]:
        """path, end: of the picture's middle; zoom: sum of |log|; turn: sum of degrees."""
        return {
            "camera_path": self.path,
            "camera_end": (self.x**2 + self.y**2) ** 0.5,
            "camera_zoom": self.zoomed,
            "camera_turn": self.turned,
            "end_x": self.x,
            "end_y": self.y,
            "end_log_zoom": self.log_zoom,
        }
