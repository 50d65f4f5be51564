"""UMT5's real classes at tiny size: an encoder, and a Unigram tokenizer with its special ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.text_cache import write_entry
from selfforcing_dfd.tiny.text import TinyText

WORDS = [
    "a",
    "disc",
    "square",
    "cross",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "and",
    "the",
    "red",
    "blue",
]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz,.!&<>'0123456789"
PAD, EOS, UNKNOWN = 0, 1, 2
DIM, VOCABULARY, MAX_LENGTH = 32, 96, 24

FLOAT32 = {"atol": 2e-5, "rtol": 0}
"""Two layers whose states reach 4: sums over masked keys in another order leave 1e-6; an unmasked
key moves 1e-2.
"""
PROMPTS = ["a disc moves left", "", "the red square, the blue cross & a disc move up and down"]
NASTY = [
    "  a\n\n disc\tmoves \u00a0 left \u3000",
    "caf\u00c3\u00a9 &amp;amp;lt; &amp;quot;disc&amp;quot;",
    "<b> &amp;amp;lt;",  # beside a tag ftfy leaves entities alone
    "\u201csmart\u201d \ufb01ne\u2026 \u200b",
    "\x1b[31mred\x1b[0m",
    "",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, else characters, else unknown; prompts end with eos.

    It lower-cases, which T5Tokenizer does not.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += (
        [(f"▁{word}", -3.0) for word in WORDS]
        + [("▁", -4.0)]
        + [(letter, -8.0) for letter in CHARACTERS]
    )
    words = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    words.decoder = decoders.Metaspace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **names)


def tiny_encoder(seed: int = 0, **changes: Any) -> UMT5EncoderModel:
    """Two layers with a position bias each, as in UMT5; every weight is a function of the seed."""
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": DIM,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = UMT5Config(**{**sizes, "feed_forward_proj": "gated-gelu", **changes})
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            values = rng.normal(tuple(parameter.shape), seed, f"umt5 {name}")
            scale = 1 if "shared" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(1 + 0.1 * values if parameter.ndim == 1 else values * scale)
    return encoder


def tiny_wan_text(
    max_length: int = MAX_LENGTH, seed: int = 0, dtype: torch.dtype = torch.float32
) -> WanText:
    return WanText(tiny_tokenizer(), tiny_encoder(seed), max_length, dtype=dtype)


def save_text_folder(folder: Path, seed: int = 0, max_shard_size: str = "50GB") -> Path:
    """Write `text_encoder` and `tokenizer` of a diffusers folder.

    The tokenizer's config names the same class as Wan's.
    """
    tiny_encoder(seed).save_pretrained(folder / "text_encoder", max_shard_size=max_shard_size)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "T5TokenizerFast"))
    return folder


class Counting:
    """A text encoder that remembers what it was asked."""

    def __init__(self, inner: WanText | TinyText):
        self.inner, self.asked = inner, list[str]()

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    def encode(self, captions: list[str]) -> Tensor:
        self.asked += captions
        return self.inner.encode(captions)


def unwanted() -> WanText:
    raise AssertionError("the text encoder was loaded although every prompt is in the cache")


def write_again_and_again(path: Path, states: Tensor) -> None:
    for _ in range(60):
        write_entry(path, states, "a disc")
