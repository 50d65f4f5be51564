"""Wan's text: cleaning, padding, truncation, and loading as saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline, prompt_clean
from safetensors.torch import load_file, save_file
from tiny_text import (
    EOS,
    FLOAT32,
    MAX_LENGTH,
    NASTY,
    PROMPTS,
    save_text_folder,
    tiny_encoder,
    tiny_tokenizer,
    tiny_wan_text,
)

from selfforcing_dfd.codecs.prompts import TextError, clean_prompt
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.text_cache import CachedText
from selfforcing_dfd.codecs.text_files import check_embedding, folder_fingerprint


@pytest.fixture(scope="module")
def text() -> WanText:
    return tiny_wan_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in several shards."""
    return save_text_folder(tmp_path_factory.mktemp("wan"), max_shard_size="10KB")


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "wan"))


@pytest.mark.parametrize("prompt", NASTY)
def test_prompts_are_cleaned_as_in_diffusers(prompt):
    """Catches one unescape instead of two, broken characters left in, and extra white space."""
    assert clean_prompt(prompt) == prompt_clean(prompt)


def test_cleaning_repairs_decodes_twice_and_collapses():
    """Catches errors in cleaning that the comparison above misses without ftfy.

    diffusers silently skips ftfy where it is missing.
    """
    assert clean_prompt("  caf\u00c3\u00a9\n&amp;amp;  \u201ca\u201d ") == 'caf\u00e9 & "a"'


def test_embeddings_are_those_of_diffusers_wan_pipeline(text):
    """Catches another padding, mask, cleaning or length than Wan's.

    Wan's pipeline pads every prompt to the full length.
    """
    pipeline = WanPipeline(text.tokenizer, text.encoder, vae=None, scheduler=None)
    expected = pipeline._get_t5_prompt_embeds(
        [*PROMPTS, *NASTY], max_sequence_length=MAX_LENGTH, device="cpu"
    )
    torch.testing.assert_close(text.encode([*PROMPTS, *NASTY]), expected, **FLOAT32)


def test_padding_is_exactly_zero_and_nothing_else_is(text):
    """Catches states of padding tokens that are not zero.

    They are as large as those of words, and Wan's transformer attends to them.
    """
    states = text.encode(PROMPTS)
    lengths = [len(text.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    for row, length in zip(states, lengths, strict=True):
        assert row.ne(0).any(-1).tolist() == [True] * length + [False] * (MAX_LENGTH - length)


def test_a_prompt_does_not_depend_on_its_batch(text):
    """Catches a mask that does not reach the encoder.

    A short prompt would read the padding next to a long one.
    """
    together = text.encode(PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        torch.testing.assert_close(row, text.encode([prompt])[0], **FLOAT32)


def test_the_empty_prompt_is_the_end_token_alone(text):
    """Catches a prompt of no tokens, for which attention is undefined."""
    ids, mask = text.tokenize([""])
    assert (ids.tolist(), mask.tolist()) == ([[EOS]], [[1]])
    assert text.encode([""])[0].ne(0).any(-1).sum() == 1


@pytest.mark.parametrize("words", [MAX_LENGTH - 1, MAX_LENGTH, 80])
def test_long_prompts_keep_their_end_and_say_so(text, caplog, words):
    """Catches a cut that drops the end token, and a cut without a warning.

    Every training prompt had an end token. 24 tokens fit.
    """
    ids, _ = text.tokenize(["disc " * words])
    assert ids.shape == (1, MAX_LENGTH)
    assert ids[0, -1] == EOS
    assert (f"a prompt of {words + 1} tokens is cut to {MAX_LENGTH}" in caplog.text) == (
        words >= MAX_LENGTH
    )


def test_an_encoder_in_training_mode_is_put_to_rest():
    """Catches dropout: UMT5's config has 0.1, and an encoder just built is in training mode."""
    text = WanText(tiny_tokenizer(), tiny_encoder().train(), MAX_LENGTH)
    assert torch.equal(text.encode(["a disc"]), text.encode(["a disc"]))


def test_half_precision_comes_out_as_float32_near_the_exact_states(text):
    """Catches states computed in another dtype than asked, or returned in bfloat16.

    Relative error 1e-2: two layers of bfloat16, each operation good to 4e-3.
    """
    states = tiny_wan_text(dtype=torch.bfloat16).encode(PROMPTS)
    exact = text.encode(PROMPTS)
    assert states.dtype == torch.float32
    assert torch.equal(states, states.bfloat16().float())
    assert 1e-4 < (states - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("captions", ["a disc", []])
def test_captions_that_are_no_list_of_prompts_are_refused(text, captions, tmp_path):
    """Catches a prompt read letter by letter, as six prompts."""
    for encoder in (text, CachedText(text, tmp_path)):
        with pytest.raises(TextError, match="want a list of at least one string"):
            encoder.encode(captions)


def test_states_that_are_not_finite_are_refused():
    """Catches NaN from an overflow of float16, kept in the cache for ever."""
    text = tiny_wan_text()
    text.encoder.encoder.final_layer_norm.weight[3] = torch.inf
    with pytest.raises(
        TextError, match=r"NaN or infinity in torch.float32; use bfloat16 or float32"
    ):
        text.encode(["a disc"])


def drop_end(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = None


def drop_padding(tokenizer: Any) -> None:
    tokenizer.pad_token = None


def add_words(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<new{i}>" for i in range(80)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_end, r"makes \[\] of '', not eos"),
        (drop_padding, "no padding token"),
        (add_words, r"has \d+ tokens, the encoder 96"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(damage, message):
    """Catches prompts without an end token, and ids beyond the word vectors.

    Such ids fail deep inside a CUDA kernel.
    """
    tokenizer = tiny_tokenizer()
    damage(tokenizer)
    with pytest.raises(TextError, match=message):
        WanText(tokenizer, tiny_encoder())


@pytest.mark.parametrize(
    "names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_is_what_is_loaded(folder, tmp_path, names, tied):
    """Catches word vectors left at zero or at random.

    transformers 5 ties them by a rule that has changed twice. Checkpoints have either name or both,
    and their configs say that nothing is tied.
    """
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    encoder = tiny_encoder(seed=1)
    encoder.config.save_pretrained(tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": tied}))
    state = {
        name: value
        for name, value in encoder.state_dict().items()
        if "embed" not in name and "shared" not in name
    }
    state |= {f"{name}.weight": encoder.shared.weight.detach().clone() for name in names}
    save_file(state, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    loaded = WanText.from_pretrained(tmp_path, dtype=torch.float32, max_length=MAX_LENGTH)
    assert torch.equal(loaded.encode(PROMPTS), tiny_wan_text(seed=1).encode(PROMPTS))


def test_a_sharded_folder_gives_the_saved_encoder(folder, text):
    """Catches a tokenizer rebuilt from its vocabulary.

    AutoTokenizer then drops the normalisation of tokenizer.json.
    """
    loaded = WanText.from_pretrained(folder, dtype=torch.float32, max_length=MAX_LENGTH)
    assert loaded.tokenizer("A DISC")["input_ids"] == tiny_tokenizer()("a disc")["input_ids"]
    assert torch.equal(loaded.encode(["A DISC", *PROMPTS]), text.encode(["a disc", *PROMPTS]))


def test_word_vectors_that_did_not_arrive_are_noticed(folder):
    """Catches embed_tokens left at zero, a fault of transformers 5.0.

    Every prompt would give the same states.
    """
    encoder = tiny_encoder()
    check_embedding(encoder, folder / "text_encoder")
    encoder.encoder.embed_tokens.weight = torch.nn.Parameter(
        torch.zeros_like(encoder.shared.weight)
    )
    with pytest.raises(TextError, match=r"word vectors of .* did not reach the encoder"):
        check_embedding(encoder, folder / "text_encoder")


def test_missing_tensors_are_refused_by_name(own_folder):
    """Catches weights that transformers fills with random numbers and a line in the log."""
    shard = own_folder / "text_encoder" / "model-00005-of-00011.safetensors"
    state = load_file(shard)
    name, _ = state.popitem()
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(
        TextError, match=rf"lacks {name} \(1 tensors\); fetch them: hf download Wan-AI/Wan2.1-T2V"
    ):
        WanText.from_pretrained(own_folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model-00003-of-00011.safetensors", "../tokenizer/tokenizer.json"]
)
def test_missing_files_are_named_with_the_command_that_fetches_them(own_folder, name):
    """Catches a partial download that fails deep inside a library, or asks the network."""
    path = (own_folder / "text_encoder" / name).resolve()
    path.unlink()
    with pytest.raises(TextError) as error:
        WanText.from_pretrained(own_folder)
    assert (
        f"lacks {path.relative_to(own_folder)}; fetch them: hf download Wan-AI/Wan2.1-T2V"
        in str(error.value)
    )
    assert f"--local-dir {own_folder}" in str(error.value)


def test_a_file_cut_short_and_a_pointer_are_no_weights(own_folder):
    """Catches a download that was interrupted, and a clone without git-lfs."""
    shard = own_folder / "text_encoder" / "model-00002-of-00011.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(TextError, match="not what its header says: it was cut short"):
        WanText.from_pretrained(own_folder)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(TextError, match="no safetensors file, perhaps a git-lfs pointer"):
        WanText.from_pretrained(own_folder)


def test_another_models_text_encoder_is_refused(own_folder):
    """Catches a T5 of another pipeline: its one position bias would be used for 24 layers."""
    config = own_folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"umt5"', '"t5"'))
    with pytest.raises(TextError, match=r"describes a 't5' model; Wan2.1 wants 'umt5'"):
        WanText.from_pretrained(own_folder)


def test_fingerprint_follows_what_the_embeddings_depend_on(own_folder):
    """Catches stale embeddings: other weights, words, dtype or length, the same config."""

    def of(dtype: torch.dtype = torch.float32, length: int = MAX_LENGTH) -> str:
        return folder_fingerprint(own_folder, dtype, length)

    first = of()
    marks = [first, of(torch.bfloat16), of(length=512)]
    words = own_folder / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text().replace("▁disc", "▁ring"))
    marks.append(of())
    save_text_folder(own_folder, seed=3, max_shard_size="10KB")
    marks.append(of())
    assert len(set(marks)) == len(marks)
    save_text_folder(own_folder, max_shard_size="10KB")
    assert of() == first


def test_fingerprint_in_memory_knows_the_weights_and_survives_use(text):
    """Catches a fingerprint of the config alone, and one that changes with the first call.

    The first call sets the tokenizer's padding.
    """
    text.encode(PROMPTS)
    assert (
        tiny_wan_text().fingerprint
        == tiny_wan_text().fingerprint
        != tiny_wan_text(seed=5).fingerprint
    )
    assert tiny_wan_text().fingerprint == text.fingerprint
    assert tiny_wan_text(max_length=9).fingerprint != text.fingerprint
