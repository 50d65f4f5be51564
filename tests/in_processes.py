"""Work for other processes, which import little for it."""

from __future__ import annotations

import time

import torch


def doubled(number: int) -> tuple[int, int]:
    """Twice the number, and with how many threads PyTorch computes; some take longer."""
    time.sleep(0.02 * (number % 3))
    return 2 * number, torch.get_num_threads()
