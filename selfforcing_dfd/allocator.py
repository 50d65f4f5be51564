"""The C allocator's settings. Freed tensors of tens of megabytes otherwise go back to the system
and fault in anew.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 32 << 20  # the largest that glibc accepts for mmap


def tune_allocator() -> None:
    """Make glibc keep large freed blocks (Linux; elsewhere nothing happens). Call before the first
    tensor.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
