"""Wan's text encoder: UMT5 through transformers, with prompts cleaned and padded as Wan does."""

from __future__ import annotations

import json
import logging
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from selfforcing_dfd.codecs.prompts import MAX_LENGTH, TextError, check_captions, clean_prompt
from selfforcing_dfd.codecs.text_cache import CachedText
from selfforcing_dfd.codecs.text_files import (
    SAMPLE_BYTES,
    check_embedding,
    fetch,
    fingerprint_of,
    folder_fingerprint,
)

logger = logging.getLogger(__name__)


class WanText:
    """Prompts to UMT5 states [B, max_length, D_text] in float32, exactly zero past each end.

    Computes in the encoder's dtype. Several threads may call it.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: Any,
        max_length: int = MAX_LENGTH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fingerprint: str = "",
    ) -> None:
        """tokenizer, encoder: transformers' fast tokenizer and UMT5EncoderModel.

        device, dtype: None keeps the encoder's. fingerprint: the name of both in caches, computed
        from them if empty. Raises TextError for a tokenizer that does not end prompts, has no
        padding, or has more tokens than the encoder.
        """
        check_tokenizer(tokenizer, int(encoder.config.vocab_size))
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.encoder = encoder.to(device=device, dtype=dtype).requires_grad_(False).eval()
        self._fingerprint = fingerprint
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = MAX_LENGTH,
    ) -> Self:
        """From a diffusers folder of Wan: its subfolders `text_encoder` and `tokenizer`.

        Raises TextError for missing files, with the command that fetches them, for another model,
        and for weights that did not arrive.
        """
        # seconds to import, needed here only
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

        # checks that the files are there
        fingerprint = folder_fingerprint(folder, dtype, max_length)
        path = Path(folder) / "text_encoder"
        # AutoTokenizer would rebuild a T5Tokenizer and drop what tokenizer.json says about
        # normalisation
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            Path(folder) / "tokenizer", local_files_only=True
        )
        loaded: Any = UMT5EncoderModel.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        encoder, loading = loaded
        missing = sorted(loading["missing_keys"])
        if missing:
            raise TextError(
                f"{path} lacks {', '.join(missing[:5])} ({len(missing)} tensors); {fetch(folder)}"
            )
        check_embedding(encoder, path)
        return cls(tokenizer, encoder, max_length, device, fingerprint=fingerprint)

    @classmethod
    def cached(
        cls,
        folder: Path | str,
        cache: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        max_length: int = MAX_LENGTH,
        keeps: bool = True,
    ) -> CachedText:
        """`from_pretrained` behind a cache: the weights are read at the first new prompt.

        keeps: or at every new prompt, and forgotten after it.
        """
        fingerprint = folder_fingerprint(folder, dtype, max_length)
        return CachedText(
            lambda: cls.from_pretrained(folder, device, dtype, max_length),
            cache,
            fingerprint,
            keeps,
        )

    @property
    def fingerprint(self) -> str:
        """Names tokenizer, encoder, dtype and length: the given one, or that of the contents."""
        return self._fingerprint or self._fingerprint_of_contents

    @cached_property
    def _fingerprint_of_contents(self) -> str:
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        words.update(truncation=None, padding=None)  # the last call's settings stay there
        config = self.encoder.config.to_dict()
        config.update(_name_or_path=None, transformers_version=None)
        parts = [
            json.dumps(part, sort_keys=True, default=str).encode()
            for part in (words, config, self.max_length)
        ]
        for name, tensor in sorted(self.encoder.state_dict().items()):
            sample = tensor.flatten()[: SAMPLE_BYTES // 4].float().cpu().numpy().tobytes()
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + sample)
        return fingerprint_of(parts)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """[B, max_length, D_text] float32 on the encoder's device.

        Prompts beyond max_length tokens are cut, with a warning. Raises TextError for no captions,
        for one string, and for states that are not finite.
        """
        ids, mask = self.tokenize(captions)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask.to(states.device)  # accelerate's hooks may have moved the encoder
        if not states[mask.bool()].isfinite().all():
            raise TextError(
                f"the text encoder gives NaN or infinity in {self.encoder.dtype}; use bfloat16 or "
                "float32"
            )
        kept = states.masked_fill(~mask.bool()[..., None], 0)
        return pad(kept, (0, 0, 0, self.max_length - kept.shape[1]))

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, n] of cleaned captions, each ending in eos.

        n is the longest caption's length, at most max_length. Padding to max_length would change
        nothing: padding is masked, and its states are replaced by zeros.
        """
        check_captions(captions)
        prompts = [clean_prompt(caption) for caption in captions]
        with self._lock:  # a call sets truncation and padding inside the tokenizer
            batch = self.tokenizer(
                prompts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=True,
                padding_side="right",
                return_tensors="pt",
            )
            full = batch["attention_mask"].sum(1) == self.max_length
            rows = full.nonzero().flatten().tolist()
            lengths = {row: len(self.tokenizer(prompts[row])["input_ids"]) for row in rows}
        for row, length in lengths.items():
            if length > self.max_length:
                logger.warning(
                    "a prompt of %d tokens is cut to %d: %.60s...",
                    length,
                    self.max_length,
                    prompts[row],
                )
        device = self.encoder.device
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raise TextError for a tokenizer that does not fit UMT5.

    It has to end even an empty prompt and to pad, and it may have no token that the encoder does
    not know.
    """
    ids = tokenizer("")["input_ids"]
    if tokenizer.eos_token_id is None or ids != [tokenizer.eos_token_id]:
        raise TextError(
            f"the tokenizer makes {ids} of '', not eos; want UMT5's, whose prompts end in </s>"
        )
    if tokenizer.pad_token_id is None:
        raise TextError("the tokenizer has no padding token; want UMT5's, where it is <pad>")
    if len(tokenizer) > vocab_size:
        raise TextError(
            f"the tokenizer has {len(tokenizer)} tokens, the encoder {vocab_size}: take both from "
            "one folder"
        )
