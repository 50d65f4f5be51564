"""Data sets as other projects write them: LMDBs of Self-Forcing, webdataset shards of FastGen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor
from webdataset import ShardWriter

from selfforcing_dfd import rng

ROW = (3, 16, 4, 6)  # F, C, H, W: no two alike
PROMPTS = ["a disc moves left", "größer  and\nredder", "a cross", "a square"]


def draw(*labels: int) -> Tensor:
    return rng.normal(ROW, 0, "imported", *labels).half().float()


def write_lmdb(
    folder: Path, rows: dict[int, Tensor], prompts: list[str], shape: str | None = None
) -> Path:
    """An environment as the scripts of Self-Forcing and CausVid write it.

    Values are raw float16; shapes are ASCII and are written last.
    """
    environment = lmdb.open(str(folder), map_size=2**24)
    with environment.begin(write=True) as transaction:
        for number, latents in rows.items():
            transaction.put(f"latents_{number}_data".encode(), latents.half().numpy().tobytes())
            transaction.put(f"prompts_{number}_data".encode(), prompts[number].encode())
        stated = shape or " ".join(map(str, (len(rows), *next(iter(rows.values())).shape)))
        transaction.put(b"latents_shape", stated.encode())
        transaction.put(b"prompts_shape", str(len(rows)).encode())
    environment.close()
    return folder


def pth(tensor: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def embedding(number: int) -> Tensor:
    """[12, 32], zeros past four tokens; values that bfloat16 holds."""
    text = torch.zeros(12, 32)
    text[:4] = rng.normal((4, 32), 0, "embedding", number).bfloat16().float()
    return text


def sample(number: int, **changes: Any) -> dict[str, bytes]:
    """As FastGen expects them: latents [C, F, H, W] and padded embeddings, in bfloat16."""
    latents = draw(number).bfloat16().transpose(0, 1).contiguous()
    members = {
        "latent.pth": pth(latents),
        "txt_emb.pth": pth(embedding(number).bfloat16()),
        **changes,
    }
    return {
        "__key__": f"{number:05d}",
        **{name: value for name, value in members.items() if value is not None},
    }


def write_tars(folder: Path, samples: list[dict[str, bytes]], size: int = 2) -> Path:
    folder.mkdir()
    with ShardWriter(str(folder / "%05d.tar"), maxcount=size, verbose=0) as writer:
        for one in samples:
            writer.write(one)
    return folder
