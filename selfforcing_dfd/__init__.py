"""Few-step autoregressive video generation: distillation and endless streaming."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfforcing_dfd.models.wan import WanTransformer
    from selfforcing_dfd.streaming.load import load_stream_model
    from selfforcing_dfd.streaming.load_wan import load_wan_model
    from selfforcing_dfd.streaming.pipeline import CausalWanPipeline
    from selfforcing_dfd.streaming.session import StreamSession, StreamSettings

__version__ = "0.2.0"
__all__ = [
    "CausalWanPipeline",
    "StreamSession",
    "StreamSettings",
    "WanTransformer",
    "load_stream_model",
    "load_wan_model",
]

HOMES = {
    "CausalWanPipeline": "selfforcing_dfd.streaming.pipeline",
    "StreamSession": "selfforcing_dfd.streaming.session",
    "StreamSettings": "selfforcing_dfd.streaming.session",
    "WanTransformer": "selfforcing_dfd.models.wan",
    "load_stream_model": "selfforcing_dfd.streaming.load",
    "load_wan_model": "selfforcing_dfd.streaming.load_wan",
}
"""The module of each public name. It is imported with the name's first use: torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
