"""LoRA adapters for the transformer, under any of the names that are in use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.hub import LOCATION


class AdapterError(UserError):
    """An adapter for another model, or of another format; the message says what to do."""


class LoraMixin:
    """For a class with diffusers' PeftAdapterMixin, named before it."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """diffusers' method, also for names of diffusers' pipelines, original Wan and musubi.

        Safetensors file, folder, hub repository or dict. Text that was prepared before (a stream's
        prompt) keeps its old keys: set the prompt again. Raises AdapterError for an adapter of
        another model or size.
        """
        from diffusers.loaders import WanLoraLoaderMixin

        location = {key: options.pop(key) for key in (*LOCATION, "weight_name") if key in options}
        options.pop("use_safetensors", None)
        given = pretrained_model_name_or_path_or_dict
        source = dict(given) if isinstance(given, dict) else str(given)
        _require_safetensors(source, location.get("weight_name"))
        tensors, metadata = WanLoraLoaderMixin.lora_state_dict(
            source, use_safetensors=True, return_lora_metadata=True, **location
        )
        metadata = options.pop("metadata", None) or metadata
        if prefix and any(name.startswith(f"{prefix}.") for name in tensors):
            tensors = _without_prefix(tensors, prefix)
            metadata = _without_prefix(metadata or {}, prefix)
        check_adapter(self, tensors)
        loader: Any = super()
        loader.load_lora_adapter(
            tensors, prefix=None, hotswap=hotswap, metadata=metadata or None, **options
        )


def check_adapter(network: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless LoRA tensors fit a network; they are named as in diffusers."""
    problems = [_misfit(network, name, tensor) for name, tensor in tensors.items()]
    wrong = [problem for problem in problems if problem]
    for own, other in (("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight")):
        for name in tensors:
            partner = name.replace(own, other)
            if name.endswith(own) and partner not in tensors:
                wrong.append(f"{name}: {partner} is missing")
    if not wrong and tensors:
        return
    reason = "it is empty"
    if wrong:
        reason = f"{len(wrong)} of its {len(tensors)} tensors do not fit, first {wrong[0]}"
    config = network.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    raise AdapterError(
        f"the adapter is for another model: {reason}; use one made for {config['num_layers']} "
        f"blocks of width {width}"
    )


def _misfit(network: nn.Module, name: str, tensor: Tensor) -> str:
    """What is wrong with one LoRA tensor; empty if nothing is.

    A is [rank, in, ...], B is [out, rank, ...].
    """
    module_name, kind, rest = name.partition(".lora_")
    if not kind or not rest.startswith(("A.", "B.")):
        return f"{name}: neither lora_A nor lora_B"
    modules = dict(network.named_modules())
    weight = getattr(modules.get(module_name), "weight", None)
    if weight is None:
        return f"{name}: there is no {module_name}"
    is_input = rest.startswith("A.")
    is_bias = not is_input and rest.endswith("bias")
    wanted = weight.shape[1 if is_input else 0]
    got = tensor.shape[0 if is_bias or not is_input else 1]
    if got == wanted:
        return ""
    return f"{name}: {tuple(tensor.shape)} for {wanted} values {'in' if is_input else 'out'}"


def _require_safetensors(source: str | dict[str, Tensor], weight_name: str | None) -> None:
    """Raise AdapterError for a file of another format, which would be unpickled."""
    is_file = isinstance(source, str) and Path(source).is_file()
    named = weight_name or (source if is_file else "")
    if named and not str(named).endswith(".safetensors"):
        raise AdapterError(
            f"adapter {named} is no safetensors file, and pickles are not read; save it as "
            "safetensors"
        )


def _without_prefix(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in named.items() if name.startswith(start)
    }
