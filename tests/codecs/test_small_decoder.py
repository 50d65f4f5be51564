"""The small decoder and the one of TAEHV's layout: causal, equal frame by frame, true to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import conv2d, interpolate, relu

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.small_codec import DecoderNetwork, SmallCodec, SmallStream
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.common import UserError
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.weights.decoders import decoder_metadata, read_decoder
from selfforcing_dfd.weights.read import describe
from selfforcing_dfd.weights.stored import WeightsError

SIZE = DecoderSize(widths=(12, 8, 6), depths=(1, 2, 1))
KINDS = ("small", "taew2_1")


def randomised(network: DecoderNetwork) -> DecoderNetwork:
    """Weights under which frames, places and the past all count."""
    for number, parameter in enumerate(network.parameters()):
        drawn = rng.normal(tuple(parameter.shape), 0, "decoder", number)
        parameter.data = drawn * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return network.requires_grad_(False)


def decoder(kind: str) -> DecoderNetwork:
    return randomised(SmallDecoder(SIZE) if kind == "small" else TaewDecoder())


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return rng.normal((2, 5, 16, 2, 3), 0, "latents").float()


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_the_whole_clip(kind: str, latents: Tensor) -> None:
    """Catches a past that is forgotten, shared by a clone, or another first frame in training."""
    network = decoder(kind)
    whole = SmallStream(network).decode(latents)
    assert whole.shape == (2, 17, 16, 24, 3)
    stream = SmallStream(network)
    parts = [stream.decode(latents[:, :1]), stream.decode(latents[:, 1:3])]
    copy = stream.clone()
    copy.decode(latents[:, :2])
    parts.append(stream.decode(latents[:, 3:]))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    video, _ = network(latents)  # all frames in one call, as training does: sums in another order
    torch.testing.assert_close(video.clamp(0, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_causal_and_has_a_past(kind: str, latents: Tensor) -> None:
    """Catches a frame that sees the next one, and one that does not see the one before."""
    network = decoder(kind)
    changed = latents.clone()
    changed[:, 2] += 1
    before, after = (network(each)[0] for each in (latents, changed))
    differs = (before != after).flatten(2).any(2).all(0)
    first_changed = 1 + 4 * (2 - 1)
    assert differs.tolist() == [frame >= first_changed for frame in range(17)]


def test_it_has_ten_million_parameters_and_a_small_past() -> None:
    """Catches a default size that grew, and a stream that keeps whole activations."""
    with torch.device("meta"):
        network = SmallDecoder(DecoderSize())
        stream = SmallStream(network)
        stream.decode(torch.empty(1, 1, 16, 60, 104))
    assert 9.0e6 < sum(parameter.numel() for parameter in network.parameters()) < 10.5e6
    once = stream.num_bytes
    stream.decode(torch.empty(1, 3, 16, 60, 104, device="meta"))
    assert stream.num_bytes == once < 180e6  # float32


def test_what_does_not_fit_is_refused(latents: Tensor, codec: TinyCodec) -> None:
    """Catches channels that are cut off in silence, and a size of two levels."""
    made = SmallCodec(decoder("small"), codec)
    with pytest.raises(UserError, match=r"want \[B, F, 16, h, w\]"):
        made.start_decoding().decode(latents[:, :, :8])
    with pytest.raises(UserError, match="want 3 numbers above 0"):
        DecoderSize(widths=(8, 8))
    assert made.strides == codec.strides
    assert made.start_encoding().encode(torch.zeros(1, 1, 16, 16, 3)).shape == (1, 1, 16, 2, 2)


def test_compiled_it_is_two_programs(latents: Tensor, codec: TinyCodec) -> None:
    """Catches a past that breaks the graph, or compiles again with every frame."""
    counters.clear()
    made = SmallCodec(decoder("small"), codec)
    made.compile_decoding(backend="eager")
    video = made.start_decoding().decode(latents)
    again = made.start_decoding().decode(latents)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert torch.equal(video, again)
    torch.testing.assert_close(video, SmallStream(made.network).decode(latents))


def naive_taew(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The layout's decoder, layer by layer over all frames at once, zeros before the first.

    Written from the layout's description: number, kind and order of the layers.
    """

    def convolve(name: str, x: Tensor, padding: int = 1) -> Tensor:
        bias = tensors.get(f"{name}.bias")
        return conv2d(x, tensors[f"{name}.weight"], bias, padding=padding)

    (x,) = torch.tanh(latents / 3) * 3  # [F, C, h, w]
    x = relu(convolve("decoder.1", x))
    for start, frames in ((3, 1), (9, 2), (15, 2)):
        for number in range(start, start + 3):
            earlier = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            y = relu(convolve(f"decoder.{number}.conv.0", torch.cat([x, earlier], dim=1)))
            y = relu(convolve(f"decoder.{number}.conv.2", y))
            x = relu(convolve(f"decoder.{number}.conv.4", y) + x)
        x = interpolate(x, scale_factor=2)
        width = x.shape[1]
        x = convolve(f"decoder.{start + 4}.conv", x, padding=0)
        assert x.shape[1] == frames * width
        x = x.reshape(-1, width, *x.shape[2:])
        x = convolve(f"decoder.{start + 5}", x)
    video = convolve("decoder.22", relu(x))
    return video[3:].clamp(0, 1).permute(0, 2, 3, 1)[None]


def test_the_layout_is_decoded_as_described(latents: Tensor) -> None:
    """Catches frames in another order, a past of another layer, and three frames too many."""
    network = decoder("taew2_1")
    wanted = naive_taew(dict(network.state_dict()), latents[:1])
    assert wanted.std() > 0.01
    # sums in another order: rows are doubled after the convolution of size 1
    torch.testing.assert_close(SmallStream(network).decode(latents[:1]), wanted)


def taew_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder in TAEHV's `taew2_1` file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for start, width, frames, following in ((3, 256, 1, 128), (9, 128, 2, 64), (15, 64, 2, 64)):
        for block in range(3):
            for part, factor in ((0, 2), (2, 1), (4, 1)):
                name = f"decoder.{start + block}.conv.{part}"
                shapes[f"{name}.weight"] = (width, factor * width, 3, 3)
                shapes[f"{name}.bias"] = (width,)
        shapes[f"decoder.{start + 4}.conv.weight"] = (frames * width, width, 1, 1)
        shapes[f"decoder.{start + 5}.weight"] = (following, width, 3, 3)
    for number, outputs, inputs in ((1, 256, 16), (22, 3, 64)):
        shapes[f"decoder.{number}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"decoder.{number}.bias"] = (outputs,)
    return shapes


@pytest.fixture(scope="module")
def taew() -> dict[str, Tensor]:
    """A file's content, the encoder's tensors too."""
    named = {name: torch.randn(shape) for name, shape in taew_shapes().items()}
    return {**named, "encoder.0.weight": torch.zeros(64, 3, 3, 3)}


def test_files_of_the_layout_are_read(taew: dict[str, Tensor], tmp_path: Path) -> None:
    """Catches a name or a shape that the public file has otherwise, and an encoder in the way."""
    save_file(taew, tmp_path / "taew2_1.safetensors")
    torch.save(taew, tmp_path / "taew2_1.pth")
    for name in ("taew2_1.safetensors", "taew2_1.pth"):
        found = read_decoder(tmp_path / name)
        assert isinstance(found.network, TaewDecoder)
        read = found.network.state_dict()
        assert read.keys() == taew_shapes().keys()
        assert all(torch.equal(read[key], taew[key]) for key in read)
        found.check_latents("wan-vae-0123")
        with pytest.raises(WeightsError, match=r"latents of the VAE of Wan2\.1, but these are of"):
            found.check_latents("tiny-codec-0123")


def test_of_more_frames_the_last_are_taken(taew: dict[str, Tensor], tmp_path: Path) -> None:
    """Catches first frames in place of last ones, where a file has more than are made."""
    name = "decoder.7.conv.weight"
    longer = {**taew, name: torch.cat([torch.zeros_like(taew[name]), taew[name]])}
    save_file(longer, tmp_path / "long.safetensors")
    read = read_decoder(tmp_path / "long.safetensors").network.state_dict()
    assert torch.equal(read[name], taew[name])


def test_other_files_are_refused_by_name(taew: dict[str, Tensor], tmp_path: Path) -> None:
    """Catches tensors left out in silence, another model's decoder, and a pickle that may call."""
    path = tmp_path / "wrong.safetensors"
    wrong = {**taew, "decoder.1.weight": torch.zeros(256, 48, 3, 3), "decoder.99": torch.zeros(1)}
    del wrong["decoder.22.bias"]
    save_file(wrong, path)
    with pytest.raises(WeightsError) as error:
        read_decoder(path)
    for part in ("decoder.22.bias is missing", "decoder.99 is unexpected", "[256, 48, 3, 3]"):
        assert part in str(error.value)
    save_file({**taew, "decoder.1.bias": torch.full((256,), torch.nan)}, path)
    with pytest.raises(WeightsError, match=r"decoder\.1\.bias is not finite"):
        read_decoder(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="holds no small decoder"):
        read_decoder(path)
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match="is refused"):
        read_decoder(tmp_path / "module.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        read_decoder(tmp_path / "nowhere")


def test_our_file_says_all_of_itself(tmp_path: Path) -> None:
    """Catches a size or a codec that the file does not state, and a decoder taken for a student."""
    network = decoder("small")
    path = tmp_path / "decoder.safetensors"
    save_file(dict(network.state_dict()), path, decoder_metadata(SIZE, "tiny-codec-1"))
    found = read_decoder(path)
    assert isinstance(found.network, SmallDecoder)
    assert found.network.size == SIZE
    assert found.codec == "tiny-codec-1"
    found.check_latents("tiny-codec-1")
    for other in ("tiny-codec-2", "wan-vae-1"):
        with pytest.raises(WeightsError, match="decodes latents of tiny-codec-1"):
            found.check_latents(other)
    with pytest.raises(WeightsError, match="is a small decoder and no transformer"):
        describe(path)
