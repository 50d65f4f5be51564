"""Wan's text encoder: UMT5 through transformers, prompts cleaned and padded as Wan does, embeddings
kept on disk.

A negative prompt is a prompt like any other: name it in the recipe and encode it; with `CachedText`
that happens once.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import re
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from selfforcing_dfd.codecs.protocol import TextEncoder
from selfforcing_dfd.common import UserError

log = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens, the end included; Wan2.1's text_len
SAMPLE_BYTES = 1024  # of each tensor, in a fingerprint
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What Wan2.1 guides away from unless told otherwise (sample_neg_prompt of its shared config): the
unconditional half.
"""
REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # the encoder of 14B is the same


class TextError(UserError):
    """Files, a tokenizer, prompts or embeddings that cannot be used; the message says what was
    wanted.
    """


def clean_prompt(prompt: str) -> str:
    """As Wan does: broken characters repaired by ftfy, HTML entities decoded twice, white space
    collapsed and stripped.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class WanText:
    """Prompts to UMT5 states [B, max_length, D_text] in float32, exactly zero past each prompt's
    end.

    Computes in the encoder's dtype. Safe to call from several threads.
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
        """tokenizer, encoder: transformers' fast tokenizer and UMT5EncoderModel. device, dtype:
        None is as they are.

        fingerprint: what stands for them in caches, worked out from both if empty. Raises TextError
        for a tokenizer that does not end prompts, has no padding, or has more tokens than the
        encoder.
        """
        check_tokenizer(tokenizer, int(encoder.config.vocab_size))
        self.tokenizer, self.max_length = tokenizer, max_length
        self.encoder = encoder.to(device=device, dtype=dtype).requires_grad_(False).eval()
        self._fingerprint, self._lock = fingerprint, threading.Lock()

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
        if missing := sorted(loading["missing_keys"]):
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
    ) -> CachedText:
        """`from_pretrained` behind a cache: the weights are read when the first new prompt comes,
        if ever.
        """
        fingerprint = folder_fingerprint(folder, dtype, max_length)
        return CachedText(
            lambda: cls.from_pretrained(folder, device, dtype, max_length), cache, fingerprint
        )

    @property
    def fingerprint(self) -> str:
        """Names tokenizer, encoder, dtype and length, from what `folder_fingerprint` lists or from
        the same in memory.
        """
        return self._fingerprint or self._fingerprint_of_contents

    @cached_property
    def _fingerprint_of_contents(self) -> str:
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        words.update(truncation=None, padding=None)  # what the last call left there
        config = {
            **self.encoder.config.to_dict(),
            "_name_or_path": None,
            "transformers_version": None,
        }
        parts = [
            json.dumps(part, sort_keys=True, default=str).encode()
            for part in (words, config, self.max_length)
        ]
        for name, tensor in sorted(self.encoder.state_dict().items()):
            sample = tensor.flatten()[: SAMPLE_BYTES // 4].float().cpu().numpy().tobytes()
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + sample)
        return mark(parts)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """[B, max_length, D_text] float32 on the encoder's device; prompts beyond max_length tokens
        are cut, with a warning.

        Raises TextError for no captions, for one string, and for states that are not finite.
        """
        ids, mask = self.tokenize(captions)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if not states[mask.bool()].isfinite().all():
            raise TextError(
                f"the text encoder gives NaN or infinity in {self.encoder.dtype}; use bfloat16 or float32"
            )
        kept = states.masked_fill(~mask.bool()[..., None], 0)
        return pad(kept, (0, 0, 0, self.max_length - kept.shape[1]))

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, n] of cleaned captions, each ending in eos; n is the longest's length,
        at most max_length.

        Padding to max_length would change nothing: padding is masked, and what comes out for it is
        replaced by zeros.
        """
        if isinstance(captions, str) or not captions:
            raise TextError(f"captions are {captions!r}; want a list of at least one string")
        prompts = [clean_prompt(caption) for caption in captions]
        options = {"add_special_tokens": True, "padding_side": "right", "return_tensors": "pt"}
        with self._lock:  # a call sets truncation and padding inside the tokenizer
            batch = self.tokenizer(
                prompts, padding=True, truncation=True, max_length=self.max_length, **options
            )
            full = batch["attention_mask"].sum(1) == self.max_length
            lengths = {
                i: len(self.tokenizer(prompts[i])["input_ids"])
                for i in full.nonzero().flatten().tolist()
            }
        for row, length in lengths.items():
            if length > self.max_length:
                log.warning(
                    "a prompt of %d tokens is cut to %d: %.60s...",
                    length,
                    self.max_length,
                    prompts[row],
                )
        return batch["input_ids"].to(self.encoder.device), batch["attention_mask"].to(
            self.encoder.device
        )


class CachedText:
    """A text encoder whose embeddings are kept in a folder, one file for each prompt, without their
    zeros.

    The key is the SHA-256 of the encoder's fingerprint and the cleaned prompt. Each prompt is
    encoded by itself, so that its bits depend on no other. Any number of processes may share the
    folder. Returns float32 on the CPU.
    """

    def __init__(
        self,
        encoder: TextEncoder | Callable[[], TextEncoder],
        folder: Path | str,
        fingerprint: str = "",
    ) -> None:
        """encoder: or what makes it, called for the first prompt that is not in the folder; its
        fingerprint comes then too.

        Raises TextError if the fingerprint is missing.
        """
        self._load = encoder if callable(encoder) else lambda: encoder
        self.folder, self._lock = Path(folder), threading.Lock()
        self.fingerprint = fingerprint or ("" if callable(encoder) else encoder.fingerprint)
        if not self.fingerprint:
            raise TextError(
                "an encoder that is loaded later needs its fingerprint now; see folder_fingerprint"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        """Raises TextError if it is another one than the fingerprint says."""
        loaded = self._load()
        if loaded.fingerprint != self.fingerprint:
            raise TextError(
                f"the text encoder is {loaded.fingerprint}, the cache was opened for {self.fingerprint}; "
                "open it with the fingerprint of the encoder that is loaded"
            )
        return loaded

    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text] float32 on the CPU, zeros past each prompt's end."""
        if isinstance(captions, str) or not captions:
            raise TextError(f"captions are {captions!r}; want a list of at least one string")
        found: dict[str, Tensor] = {}
        # the encoder cleans by itself: cleaning twice would decode entities four times
        for caption in captions:
            prompt = clean_prompt(caption)
            if prompt not in found:
                cached = read_entry(self.path(prompt), prompt)
                found[prompt] = self._compute(caption, prompt) if cached is None else cached
        return torch.stack([found[clean_prompt(caption)] for caption in captions])

    def path(self, prompt: str) -> Path:
        """Where the embedding of a cleaned prompt is, or will be."""
        key = hashlib.sha256(f"{self.fingerprint}\n{prompt}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _compute(self, caption: str, prompt: str) -> Tensor:
        with self._lock:
            states = self.encoder.encode([caption])[0].float().cpu()
        write_entry(self.path(prompt), states, prompt)
        return states


def read_entry(path: Path, prompt: str) -> Tensor | None:
    """[L, D_text] float32 from a cache file; None if there is none, or, with a warning, if it is
    damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, rows = file.metadata() or {}, file.get_tensor("text")
        if (about["sha256"], about["prompt"]) != (digest_of(rows), prompt):
            raise TextError("its contents are not what was written")
        return pad(rows.float(), (0, 0, 0, int(about["length"]) - len(rows)))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        log.warning(
            "%s is damaged (%s: %s); the prompt is encoded anew", path, type(error).__name__, error
        )
        return None


def write_entry(path: Path, states: Tensor, prompt: str) -> None:
    """States [L, D_text] into a cache file that appears complete or not at all; as bfloat16 where
    that loses nothing.
    """
    used = states.ne(0).any(-1).nonzero()
    rows = states[: int(used.max()) + 1 if len(used) else 0]
    rows = rows.bfloat16() if rows.bfloat16().float().equal(rows) else rows
    about = {"prompt": prompt, "length": str(len(states)), "sha256": digest_of(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(save({"text": rows.contiguous()}, about))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def digest_of(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def mark(parts: list[bytes]) -> str:
    """The fingerprint of these bytes; each part's length counts, so that nothing can move between
    them.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    return f"umt5-{digest.hexdigest()[:16]}"


def fetch(folder: Path | str) -> str:
    """The cure for missing files."""
    return f"fetch them: hf download {REPOSITORY} --include 'text_encoder/*' --include 'tokenizer/*' --local-dir {folder}"


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a model's folder, whether they exist or not."""
    index = path / "model.safetensors.index.json"
    names = (
        json.loads(index.read_text())["weight_map"].values()
        if index.is_file()
        else ["model.safetensors"]
    )
    return [path / name for name in sorted(set(names))]


def folder_fingerprint(folder: Path | str, dtype: torch.dtype, max_length: int = MAX_LENGTH) -> str:
    """What `WanText.from_pretrained` of this folder will call itself, in about a second and without
    its 11 GB of weights.

    Covers the encoder's config, the tokenizer's files, dtype and length, and of the weights every
    tensor's name, shape, type, file and first KiB: not a change further inside a tensor alone.
    Raises TextError for missing files.
    """
    encoder, tokenizer = Path(folder) / "text_encoder", Path(folder) / "tokenizer"
    wanted = [encoder / "config.json", *weight_files(encoder), tokenizer / "tokenizer.json"]
    if missing := [str(path.relative_to(folder)) for path in wanted if not path.is_file()]:
        raise TextError(f"{folder} lacks {', '.join(missing)}; {fetch(folder)}")
    kind = json.loads(wanted[0].read_text()).get("model_type")
    if kind != "umt5":
        raise TextError(
            f"{wanted[0]} describes a {kind!r} model; Wan2.1 wants 'umt5'; {fetch(folder)}"
        )
    words = [
        tokenizer / name
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    ]
    parts = [path.read_bytes() for path in (wanted[0], *words) if path.is_file()]
    return mark(
        [
            *parts,
            f"{dtype} {max_length}".encode(),
            *(s for f in weight_files(encoder) for s in samples(f)),
        ]
    )


def samples(path: Path) -> Iterator[bytes]:
    """A safetensors file's header, then the beginning of each of its tensors. Raises TextError for
    a file cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = file.read(min(struct.unpack("<Q", file.read(8))[0], size))
            tensors = {
                name: about["data_offsets"]
                for name, about in json.loads(header).items()
                if name[:2] != "__"
            }
        except (struct.error, ValueError) as error:
            raise TextError(
                f"{path} is no safetensors file, perhaps a git-lfs pointer; fetch it again"
            ) from error
        start = file.tell()
        if size != start + max((last for _, last in tensors.values()), default=0):
            raise TextError(
                f"{path} has {size} bytes, not what its header says: it was cut short; fetch it again"
            )
        yield header
        for _, (first, last) in sorted(tensors.items()):
            file.seek(start + first)
            yield file.read(min(last - first, SAMPLE_BYTES))


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises TextError unless it ends even an empty prompt, can pad, and has no token that the
    encoder does not know.
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
            f"the tokenizer has {len(tokenizer)} tokens, the encoder {vocab_size}: take both from one folder"
        )


def check_embedding(encoder: Any, path: Path) -> None:
    """Raises TextError if the word vectors in use are not those of the files, as with transformers
    5.0 and 5.1.

    There `encoder.embed_tokens` stays untied from `shared`, all zeros (pull request 43880 of
    transformers).
    """
    saved = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            for name in {"encoder.embed_tokens.weight", "shared.weight"} & set(tensors.keys()):
                saved[name] = tensors.get_slice(name)[:64]
    rows = saved.get("encoder.embed_tokens.weight", saved.get("shared.weight"))
    used = encoder.encoder.embed_tokens.weight[:64]
    if rows is None or not torch.equal(rows.to(used), used):
        raise TextError(
            f"the word vectors of {path} did not reach the encoder; install a newer transformers"
        )
