"""What packages say while they are imported and what no user of ours can do anything about."""

from __future__ import annotations

import logging

TALKERS = (
    "torchao",  # that parts of it, which nothing here uses, are built for another torch or GPU
    "torch.utils._pytree",  # that torchao registers its types in a way that will go
    "diffusers.quantizers.torchao.torchao_quantizer",  # that it does not read torchao's files
)


def quieten() -> None:
    """Let these loggers say errors alone. To be called before the packages are imported."""
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
