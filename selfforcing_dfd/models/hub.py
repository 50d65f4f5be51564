"""Loading the transformer as diffusers does, but never a teacher in place of a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.identity import KEYS, ROLE, Role, identity_of, mark, role_of

ARCHITECTURE = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "pos_embed_seq_len": None,
}
"""Settings of diffusers' class that are the same in all models that are read here."""
LOCATION = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
OTHER_ROLES: dict[Role | None, str] = {
    "teacher": "holds Wan's bidirectional transformer, which sees the whole clip at once, and no "
    "causal student",
    "bidirectional_student": "holds a bidirectional student, which makes a whole clip at once and "
    "cannot go on from chunk to chunk",
    "fake_score": "holds a fake score, which is bidirectional and no causal student",
    None: "does not say whether it holds a causal student or a bidirectional teacher",
}
"""What an error says of weights that are no causal student's."""


class HubError(UserError):
    """Weights of another role, architecture or size than asked for; the message says what to do."""


def require_student(config: Mapping[str, Any], where: str) -> None:
    """Raise HubError unless the config says that its weights are a causal student's."""
    role = role_of(config)
    if role != "causal_student":
        raise HubError(
            f"{where} {OTHER_ROLES[role]}. Name a student: student=PATH for the pipeline, "
            "--weights PATH for inference/stream.py; or, if these weights are a causal "
            f'student\'s, write "{ROLE}": "causal_student" into the transformer\'s config.json; '
            "or, to get the bidirectional transformer on purpose, "
            "WanTransformer.from_pretrained(..., teacher=True)"
        )


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Raise HubError for a config that is not diffusers' layout of Wan2.1, for text or images."""
    if "dim" in config or config.get("_class_name") == "WanModel":
        raise HubError(
            f"{where} has the original Wan layout, not diffusers'; read it with "
            "selfforcing_dfd.weights.read.load_network, or convert it: "
            "selfforcing-dfd convert"
        )
    other = {k: config[k] for k, wanted in ARCHITECTURE.items() if config.get(k, wanted) != wanted}
    if other:
        raise HubError(
            f"{where} is another architecture: {other}; wanted: Wan2.1 for text-to-video or "
            f"image-to-video, that is {ARCHITECTURE}"
        )


class HubMixin:
    """For a ModelMixin with ConfigMixin, named before them: loads strictly and in one role only."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, teacher: bool = False, **options: Any
    ) -> Self:
        """diffusers' `from_pretrained` for a causal student, with all of its options.

        teacher: load a bidirectional transformer, and nothing else. Raises HubError for weights of
        the other role, another architecture, or tensors that are missing or left over.
        """
        location = {key: options[key] for key in LOCATION if key in options}
        loader: Any = super()
        config = loader.load_config(pretrained_model_name_or_path, **location)
        subfolder = options.get("subfolder")
        where = f"{pretrained_model_name_or_path}{f'/{subfolder}' if subfolder else ''}"
        check_architecture(config, where)
        role = role_of(config)
        if not teacher:
            require_student(config, where)
        elif role == "causal_student":
            raise HubError(
                f"{where} holds a causal student; leave teacher=True out, or name Wan's own "
                "repository"
            )
        report_too = options.pop("output_loading_info", False)
        network, report = loader.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        _refuse_differences(report, where)
        if teacher and role is None:
            mark(network, "teacher")
        result: Any = (network, report) if report_too else network
        return result

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **options: Any) -> tuple[Any, Any, Any]:
        """diffusers' split of a config into the constructor's arguments and what stays beside them.

        Role, recipe and training data stay.
        """
        kept = identity_of(config_dict).notes()
        rest = {key: value for key, value in config_dict.items() if key not in KEYS}
        splitter: Any = super()
        init, unused, hidden = splitter.extract_init_dict(rest, **options)
        return init, unused, {**hidden, **kept}


def _refuse_differences(report: Mapping[str, Any], where: str) -> None:
    """Raise HubError for missing, left over or misshapen tensors, of which diffusers only warns."""
    found = {kind: list(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(found.values()):
        counts = [
            f"{len(names)} {kind}, first {names[0]}" for kind, names in found.items() if names
        ]
        raise HubError(
            f"{where}: weights and config.json do not belong together: {'; '.join(counts)}; fetch "
            "or export both again"
        )
