"""Hub conventions of the transformer: `from_pretrained` that tells students from teachers, and LoRA
adapters by any name.

Teacher and student have the same tensors, so what weights mean has to be written down. It stands in
the config: `"causal": true` with the student's `Recipe` in ours, `"causal": false` in a teacher
that was saved again. Wan's own configs say nothing and are teachers by their class's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.flow import few_step_ladder

Role = Literal["student", "teacher", "unknown"]
# keys of config.json; diffusers' own classes ignore them with a warning
CAUSAL, RECIPE = "causal", "student"
TEACHER_CLASSES = ("WanTransformer3DModel", "WanModel")
STUDENT_CLASSES = ("CausalWanModel",)  # as the Self-Forcing code saves its own
ARCHITECTURE = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
}
LOCATION = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)


class HubError(UserError):
    """Weights of another role, architecture or size than asked for; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student wants to be run. Raises ValueError for a ladder that does not fall from 1000,
    and for no chunks.

    timesteps: its ladder before the shift. num_frames: latent frames of its training clips, so of a
    past that it knows.
    """

    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    chunk_frames: int = 3
    num_frames: int = 21

    def __post_init__(self) -> None:
        few_step_ladder(self.timesteps, self.shift)
        if self.chunk_frames < 1 or self.num_frames < self.chunk_frames:
            raise ValueError(
                f"a recipe has chunks of {self.chunk_frames} latent frames in clips of {self.num_frames}; "
                "want at least one frame a chunk and one chunk a clip"
            )

    @property
    def ladder(self) -> tuple[float, ...]:
        """Its sigmas."""
        return few_step_ladder(self.timesteps, self.shift)


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a transformer's folder, or of the subfolder `transformer`; empty where there
    is none.
    """
    for path in (Path(folder) / "config.json", Path(folder) / "transformer" / "config.json"):
        if path.is_file():
            return json.loads(path.read_text())
    return {}


def role_of(config: Mapping[str, Any]) -> Role:
    """What a transformer's config says its weights are."""
    note, name = config.get(CAUSAL), config.get("_class_name")
    if note is not None:
        return "student" if note else "teacher"
    return (
        "teacher"
        if name in TEACHER_CLASSES
        else "student"
        if name in STUDENT_CLASSES
        else "unknown"
    )


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """The recipe in a student's config; Self-Forcing's where it has none. Raises HubError for
    settings it cannot have.
    """
    said = dict(config.get(RECIPE) or {})
    known = [field.name for field in dataclasses.fields(Recipe)]
    unknown = sorted(set(said) - set(known))
    if unknown:
        raise HubError(
            f"config's {RECIPE!r} has {', '.join(unknown)}; known are {', '.join(known)}"
        )
    if "timesteps" in said:
        said["timesteps"] = tuple(float(timestep) for timestep in said["timesteps"])
    return Recipe(**said)


def mark_student(network: Any, recipe: Recipe | None = None) -> None:
    """Note in a network's config that its weights are a causal student's, and how it wants to be
    run.
    """
    settings = dataclasses.asdict(recipe or Recipe())
    network.register_to_config(
        **{CAUSAL: True, RECIPE: {**settings, "timesteps": list(settings["timesteps"])}}
    )


def require_student(config: Mapping[str, Any], where: str) -> None:
    """Raise HubError unless the config says that its weights are a causal student's."""
    role = role_of(config)
    if role == "student":
        return
    what = {
        "teacher": "holds Wan's bidirectional transformer, which sees the whole clip at once, and no causal student",
        "unknown": "does not say whether it holds a causal student or a bidirectional teacher",
    }[role]
    raise HubError(
        f"{where} {what}. Name a student: student=PATH for the pipeline, --weights PATH for inference/stream.py; or, "
        "if these weights are a causal student's, add \"causal\": true to the transformer's config.json; or, to get the "
        "bidirectional transformer on purpose, WanTransformer.from_pretrained(..., teacher=True)"
    )


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Raise HubError for a config that is not diffusers' layout of Wan2.1 text-to-video."""
    if "dim" in config or config.get("_class_name") == "WanModel":
        raise HubError(
            f"{where} has the original Wan layout, not diffusers'; read it with "
            "selfforcing_dfd.weights.read.load_transformer, or convert it: python -m selfforcing_dfd convert"
        )
    other = {k: config[k] for k, wanted in ARCHITECTURE.items() if config.get(k, wanted) != wanted}
    if other:
        raise HubError(
            f"{where} is another architecture: {other}; want text-to-video Wan2.1, that is {ARCHITECTURE}"
        )


class HubMixin:
    """For a ModelMixin with ConfigMixin and PeftAdapterMixin, named before them: strict, and never
    in the wrong role.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, teacher: bool = False, **options: Any
    ) -> Self:
        """diffusers' `from_pretrained` (torch_dtype, subfolder, local_files_only ...) for a causal
        student.

        teacher: load Wan's bidirectional transformer, and nothing else. Raises HubError for weights
        of the other role, another architecture, or tensors that are missing or left over.
        """
        location = {key: options[key] for key in LOCATION if key in options}
        loader: Any = super()
        config = loader.load_config(pretrained_model_name_or_path, **location)
        where = "/".join(
            [str(pretrained_model_name_or_path), *filter(None, [options.get("subfolder")])]
        )
        check_architecture(config, where)
        if not teacher:
            require_student(config, where)
        elif role_of(config) == "student":
            raise HubError(
                f"{where} holds a causal student; leave teacher=True out, or name Wan's own repository"
            )
        report_too = options.pop("output_loading_info", False)
        network, report = loader.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        _refuse_differences(report, where)
        if teacher:
            network.register_to_config(**{CAUSAL: False})
        result: Any = (network, report) if report_too else network
        return result

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **options: Any) -> tuple[Any, Any, Any]:
        """diffusers' split of a config into what the constructor takes and what is kept beside it:
        our notes are kept.
        """
        notes = {key: config_dict[key] for key in (CAUSAL, RECIPE) if key in config_dict}
        rest = {key: value for key, value in config_dict.items() if key not in notes}
        splitter: Any = super()
        init, unused, hidden = splitter.extract_init_dict(rest, **options)
        return init, unused, {**hidden, **notes}

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """diffusers' method, for adapters as this class, diffusers' pipelines, original Wan or
        musubi name their tensors.

        Safetensors file, folder, hub repository or dict. Text that was prepared before (a stream's
        prompt) keeps its old keys: set the prompt again. Raises HubError for an adapter of another
        model or size.
        """
        from diffusers.loaders import WanLoraLoaderMixin

        source = pretrained_model_name_or_path_or_dict
        location = {key: options.pop(key) for key in (*LOCATION, "weight_name") if key in options}
        options.pop("use_safetensors", None)
        reading = {"use_safetensors": True, "return_lora_metadata": True}
        source = dict(source) if isinstance(source, dict) else str(source)
        _require_safetensors(source, location.get("weight_name"))
        tensors, metadata = WanLoraLoaderMixin.lora_state_dict(source, **reading, **location)
        metadata = options.pop("metadata", None) or metadata
        if prefix and any(name.startswith(f"{prefix}.") for name in tensors):
            tensors, metadata = _without_prefix(tensors, prefix), _without_prefix(metadata, prefix)
        check_adapter(self, tensors)
        loader: Any = super()
        loader.load_lora_adapter(
            tensors, prefix=None, hotswap=hotswap, metadata=metadata or None, **options
        )


def check_adapter(network: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise HubError for LoRA tensors (named as diffusers names modules) that do not fit a network."""
    wrong = [
        problem for name, tensor in tensors.items() if (problem := _misfit(network, name, tensor))
    ]
    other = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}
    halves = [
        (name, name.replace(one, two))
        for one, two in other.items()
        for name in tensors
        if name.endswith(one)
    ]
    wrong += [f"{name}: {half} is missing" for name, half in halves if half not in tensors]
    if wrong or not tensors:
        size = network.config["num_attention_heads"] * network.config["attention_head_dim"]
        reason = (
            f"{len(wrong)} of its {len(tensors)} tensors do not fit, first {wrong[0]}"
            if wrong
            else "it is empty"
        )
        raise HubError(
            f"the adapter is for another model: {reason}; use one made for {network.config['num_layers']} blocks of "
            f"width {size}"
        )


def _misfit(network: nn.Module, name: str, tensor: Tensor) -> str:
    """What is wrong with one LoRA tensor; empty if nothing is. A is [rank, in, ...], B is [out,
    rank, ...].
    """
    module_name, kind, rest = name.partition(".lora_")
    if not kind or not rest.startswith(("A.", "B.")):
        return f"{name}: neither lora_A nor lora_B"
    modules = dict(network.named_modules())
    weight = getattr(modules.get(module_name), "weight", None)
    if weight is None:
        return f"{name}: there is no {module_name}"
    axis, is_bias = (1, False) if rest.startswith("A.") else (0, rest.endswith("bias"))
    wanted = weight.shape[axis]
    got = tensor.shape[0] if is_bias else tensor.shape[axis]
    return (
        ""
        if got == wanted
        else f"{name}: {tuple(tensor.shape)} for {wanted} values {'in' if axis else 'out'}"
    )


def _require_safetensors(source: str | dict[str, Tensor], weight_name: str | None) -> None:
    """Raise HubError for a file of another format, which would be unpickled."""
    named = weight_name or (source if isinstance(source, str) and Path(source).is_file() else "")
    if named and not str(named).endswith(".safetensors"):
        raise HubError(
            f"adapter {named} is no safetensors file; pickles are not read: save it as safetensors"
        )


def _without_prefix(named: Mapping[str, Any] | None, prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {
        n.removeprefix(f"{prefix}."): v
        for n, v in (named or {}).items()
        if n.startswith(f"{prefix}.")
    }


def _refuse_differences(report: Mapping[str, Any], where: str) -> None:
    """Raise HubError for tensors that are missing, left over or of another shape: diffusers only
    warns of them.
    """
    found = {kind: list(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(found.values()):
        said = "; ".join(
            f"{len(names)} {kind}, first {names[0]}" for kind, names in found.items() if names
        )
        raise HubError(
            f"{where}: weights and config.json do not belong together: {said}; fetch or export both again"
        )
