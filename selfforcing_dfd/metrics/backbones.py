"""CLIP and DINO as encoders, through transformers, from a local folder. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from selfforcing_dfd.codecs.text_files import weight_files
from selfforcing_dfd.common import UserError, sha256_of
from selfforcing_dfd.metrics.features import Sampled, unit

ClipFeature = Literal["clip", "clip_projected"]
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
BATCH = 16  # frames at once
TOKENIZERS = ("tokenizer.json", "merges.txt")
WORDS = 77  # tokens that CLIP reads of a prompt


class ClipEncoder:
    """CLIP's image tower.

    `clip` is the CLS token before the last layer norm, as DP-DMD's public test of diversity has it,
    which the DFD paper follows; `clip_projected` is the embedding that is compared with text.
    """

    def __init__(
        self, folder: Path, name: ClipFeature = "clip", device: torch.device | str = "cpu"
    ) -> None:
        """Raises UserError for a folder without a CLIP model."""
        from transformers import CLIPModel

        self.name = name
        self.folder = folder
        self.device = torch.device(device)
        check_type(folder, ("clip",))
        self.model = loaded(CLIPModel, folder).to(self.device)
        self.processor = processor_of(folder)

    @torch.no_grad()
    def __call__(self, clip: Sampled) -> Tensor:
        return encoded(clip, self.processor, self.device, self.encode)

    def encode(self, pixels: Tensor) -> Tensor:
        if self.name == "clip":
            states: Tensor = self.model.vision_model(pixel_values=pixels).last_hidden_state
            return states[:, 0]
        projected: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return projected

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors [N, D] of prompts, of which CLIP reads the first 77 tokens.

        Raises UserError for a folder without a tokenizer.
        """
        from transformers import AutoTokenizer

        if not any((self.folder / name).is_file() for name in TOKENIZERS):
            # the library would make one that knows no word
            raise UserError(
                f"{self.folder} holds no tokenizer; CLIP needs tokenizer.json, or vocab.json and "
                "merges.txt, to read prompts"
            )
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        length = min(WORDS, self.model.config.text_config.max_position_embeddings)
        words = tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        found = self.model.get_text_features(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        )
        return unit(found.pooler_output.float().cpu())

    def described(self) -> dict[str, Any]:
        return described(self.folder, self.name)


class DinoEncoder:
    """The CLS token of DINO (v1), DINOv2 or DINOv3 after the last layer norm."""

    name = "dino"

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Raises UserError for a folder without such a model."""
        from transformers import AutoModel

        self.folder = folder
        self.device = torch.device(device)
        check_type(folder, DINO_TYPES)
        self.model = loaded(AutoModel, folder).to(self.device)
        self.processor = processor_of(folder)

    @torch.no_grad()
    def __call__(self, clip: Sampled) -> Tensor:
        return encoded(clip, self.processor, self.device, self.encode)

    def encode(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return states[:, 0]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features [n, D] of prepared pictures [n, 3, h, w], float32 on the CPU."""
        return self.encode(pixels.to(self.device)).float().cpu()

    def described(self) -> dict[str, Any]:
        return described(self.folder, self.name)


def check_type(folder: Path, wanted: tuple[str, ...]) -> None:
    """Raise UserError unless the folder describes one of these models."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{folder} has no config.json; want a folder that transformers has saved, with "
            "config.json, model.safetensors and preprocessor_config.json"
        )
    found = json.loads(config.read_text()).get("model_type")
    if found not in wanted:
        raise UserError(f"{config} describes a {found!r} model; want {' or '.join(wanted)}")


def loaded(kind: Any, folder: Path) -> Any:
    """The model, in evaluation mode, float32.

    UserError where weights are missing: transformers would draw them at random.
    """
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; copy the whole folder")
    model, report = kind.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    absent = [name for name in sorted(report["missing_keys"]) if not name.startswith("pooler.")]
    if absent:
        raise UserError(f"{folder} lacks the weights {', '.join(absent[:3])}; fetch it again")
    return model.eval()


def processor_of(folder: Path) -> Any:
    """What brings frames to the size and range that the model was trained on."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise UserError(
            f"the image processor of {folder} needs torchvision; pip install torchvision"
        ) from error
    except (OSError, ValueError) as error:
        problem = "holds no image processor; want preprocessor_config.json beside the weights"
        raise UserError(f"{folder} {problem}") from error


def encoded(
    clip: Sampled, processor: Any, device: torch.device, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Features [frames, D] of a clip's frames, some at a time; float32 on the CPU."""
    batches = (pixels_of(processor, frames).to(device) for frames in clip.frames.split(BATCH))
    return torch.cat([encode(pixels) for pixels in batches]).float().cpu()


def pixels_of(processor: Any, frames: Tensor) -> Tensor:
    """uint8 [K, H, W, 3] -> what the model takes, [K, 3, h, w]."""
    pictures = list(frames.numpy())
    found = processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
    pixels: Tensor = found["pixel_values"]
    return pixels


def described(folder: Path, feature: str) -> dict[str, Any]:
    """What made the features."""
    import transformers

    return {
        "backend": f"transformers {transformers.__version__}",
        "feature": feature,
        "model": json.loads((folder / "config.json").read_text())["model_type"],
        "weights_sha256": hash_of([sha256_of(path) for path in weight_files(folder)]),
    }


def hash_of(hashes: list[str]) -> str:
    """The hash of one file of weights; of several, the SHA-256 of theirs, in order."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
