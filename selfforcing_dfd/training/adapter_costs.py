"""What adapters change in a run's costs: values that are trained, weights that are shared."""

from __future__ import annotations

from dataclasses import replace

from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.models.picture import NUM_TOKENS
from selfforcing_dfd.stages import stage_of


def adapter_values(size: NetworkConfig, rank: int) -> int:
    """Values of one adapter over all blocks: D to D eight times, D to D_ffn and back.

    With a picture D to D ten times.
    """
    dim = size.num_heads * size.head_dim
    squares = 10 if size.image_dim else 8
    return size.num_layers * rank * (squares * 2 * dim + 2 * (dim + size.ffn_dim))


def adapter_flops(size: NetworkConfig, rank: int, tokens: int, text_tokens: int) -> int:
    """Of an adapter in a forward pass. Keys and values of the text are made of text tokens.

    Those of a picture are made of the picture's.
    """
    dim = size.num_heads * size.head_dim
    of_text = size.num_layers * rank * 2 * 2 * dim
    of_picture = of_text if size.image_dim else 0
    of_clip = adapter_values(size, rank) - of_text - of_picture
    return 2 * (tokens * of_clip + text_tokens * of_text + NUM_TOKENS * of_picture)


def roles_by_weights(config: Config) -> list[list[str]]:
    """The roles of the stage, together where one copy of frozen weights serves them."""
    if not config.model.lora_rank:
        return [[role] for role in stage_of(config).starts(config)]
    found: dict[object, list[str]] = {}
    for role, start in stage_of(config).starts(config).items():
        found.setdefault(replace(start, adapter=""), []).append(role)
    return list(found.values())
