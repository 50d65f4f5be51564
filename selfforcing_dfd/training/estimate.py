"""The cost of a run, estimated from sizes: operations, GPU-hours, memory of one GPU.

Arithmetic, not measurement. The stage says which passes an update makes. Operations are matrix
products and attention, two for each multiply-add. Bytes are those of tensors that are known to be
alive at once. The allocator and the CUDA context take some more. What fits is therefore judged by a
GPU's nominal size: a board of 80 GB has 85.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.cost import network_flops, peak_tflops
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import Pass, chunks_of
from selfforcing_dfd.training.build import shape_of

MASTER_BYTES = 4  # of a float32 weight, gradient, average or moment
PATCH = (2, 2)  # of Wan's transformer, height and width
MFU = 0.24
"""Share of the bf16 peak that training reaches. Self-Forcing's README: 600 iterations in under 2
hours on 64 H100, which by the operations below is 234 TFLOP/s a GPU.
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A board by its nominal memory."""

    name: str
    gigabytes: int


GPUS = (Gpu("H100", 80), Gpu("H200", 141), Gpu("A100", 80))


@dataclass(frozen=True, slots=True)
class Clip:
    """A training clip as the networks see it.

    chunks: latent frames of each; past: latent frames that each sees before itself. latent_size:
    rows and columns.
    """

    chunks: tuple[int, ...]
    past: tuple[int, ...]
    latent_size: tuple[int, int]
    text_tokens: int

    @property
    def frame_tokens(self) -> int:
        return (self.latent_size[0] // PATCH[0]) * (self.latent_size[1] // PATCH[1])

    @property
    def tokens(self) -> int:
        return sum(self.chunks) * self.frame_tokens

    def over(self, what: str) -> Clip:
        """The clip as a pass sees it: see `stages.base.Pass`."""
        if what == "chunks":
            return self
        last = -1 if what == "committed" else len(self.chunks)
        chunks = self.chunks[:last]
        past = self.past[:last]
        if what == "clip":
            chunks = (sum(self.chunks),)
            past = (0,)
        return Clip(chunks, past, self.latent_size, self.text_tokens)


def clip_of(config: Config, latent_size: tuple[int, int], text_tokens: int) -> Clip:
    """A clip of the config's chunks, sink and window. latent_size: height and width."""
    rollout = config.rollout
    chunks = chunks_of(config)
    most = rollout.frames
    if rollout.window:
        most = rollout.sink + rollout.window - rollout.chunk_frames
    past = tuple(min(chunk.start, most) for chunk in chunks)
    return Clip(tuple(chunk.frames for chunk in chunks), past, latent_size, text_tokens)


@cache
def num_parameters(size: NetworkConfig) -> int:
    return sum(parameter.numel() for parameter in shape_of(size).parameters())


@cache
def clip_flops(size: NetworkConfig, clip: Clip, gradient: bool, checkpointing: bool) -> int:
    """One pass of one sample over a clip, each chunk seeing its past and itself."""
    return network_flops(
        shape_of(size),
        1,
        clip.chunks,
        clip.latent_size,
        clip.text_tokens,
        clip.past,
        gradient=gradient,
        checkpointing=checkpointing,
    )


def attention_flops(size: NetworkConfig, clip: Clip) -> int:
    """Of attention alone in one pass of one sample: to the clip and its past, and to the text."""
    frame = clip.frame_tokens
    keys = [own * (own + before) for own, before in zip(clip.chunks, clip.past, strict=True)]
    pairs = sum(keys) * frame * frame + clip.tokens * clip.text_tokens
    return 4 * size.num_layers * size.num_heads * size.head_dim * pairs


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. lasting: all the time; phases: what is alive besides, by moment.

    The largest phase decides.
    """

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.lasting.values()) + sum(self.phases[self.peak_phase].values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """The costs of one run. sizes: of each role's network."""

    config: Config
    clip: Clip
    sizes: Mapping[str, NetworkConfig]

    @property
    def passes(self) -> dict[str, list[Pass]]:
        return stage_of(self.config).passes(self.config)

    @property
    def trained(self) -> list[str]:
        """The roles that get gradient."""
        passes = [each for of_turn in self.passes.values() for each in of_turn]
        return sorted({each.role for each in passes if each.gradient}, reverse=True)

    def flops(self, one: Pass) -> int:
        """Of one kind of pass for one sample, its backward pass included."""
        over = self.clip.over(one.over)
        if not over.chunks:
            return 0
        what = self.config.model.activation_checkpointing
        size = self.sizes[one.role]
        flops = clip_flops(size, over, one.gradient, one.gradient and what != "none")
        if one.gradient and what == "selective":
            flops -= attention_flops(size, over)  # is not made again
        return int(one.times * flops)

    def turn_flops(self, turn: str) -> dict[str, int]:
        """Of one update for one sample, by what they are for."""
        return {one.name: self.flops(one) for one in self.passes[turn]}

    def run_flops(self, num_items: int = 0) -> int:
        """Of the whole run. num_items: samples of a stage without updates."""
        updates = stage_of(self.config).updates(self.config)
        samples = {turn: updates[turn] * self.config.batch.size for turn in updates}
        return sum(
            samples.get(turn, num_items) * sum(self.turn_flops(turn).values())
            for turn in self.passes
        )

    @property
    def width(self) -> int:
        """Bytes of a value that the networks compute with."""
        return 2 if self.config.model.compute == "bfloat16" else 4

    def memory(self, gpus: int = 1) -> Memory:
        """What lies in one GPU's memory when all that lasts is sharded over `gpus`.

        Masters, gradients, average: 4 bytes a parameter each; AdamW's moments: 8; a frozen network:
        as it computes. With several GPUs the student is gathered for the rollout, and each block of
        the others when its turn comes.
        """
        lasting = self.lasting_bytes(gpus)
        phases: dict[str, dict[str, int]] = {}
        for turn, of_turn in self.passes.items():
            kept: dict[str, int] = {}
            for one in of_turn:
                if one.gradient:
                    kept = {**self.kept_bytes(one), **self.gradient_bytes(one.role, gpus)}
                    phases[f"backward pass, {turn}"] = {
                        **kept,
                        "one block run again": self.again(one),
                    }
            for one in of_turn:
                phases[one.name] = {**kept, **self.passing_bytes(one)}
        if self.trained:
            step = self.gradient_bytes("student", gpus)
            moments = 2 * self.master_bytes("student") // gpus
            phases["optimizer step"] = {**step, "its intermediate results": moments}
        return Memory(lasting, phases)

    def master_bytes(self, role: str) -> int:
        return num_parameters(self.sizes[role]) * MASTER_BYTES

    def lasting_bytes(self, gpus: int) -> dict[str, int]:
        trained = self.trained
        frozen = [role for role in self.sizes if role not in trained]
        masters = sum(self.master_bytes(role) for role in trained)
        lasting = {}
        if trained:
            networks = f"{len(trained)} trained network{'s' * (len(trained) > 1)}"
            lasting[f"weights of {networks}, float32"] = masters // gpus
            lasting["AdamW's two moments"] = 2 * masters // gpus
            lasting["average of the student (EMA)"] = self.master_bytes("student") // gpus
        for role in frozen:
            lasting[role] = num_parameters(self.sizes[role]) * self.width // gpus
        if gpus > 1 and trained:
            size = self.sizes["student"]
            gathered = (1 + 2 / size.num_layers) * num_parameters(size) * self.width
            lasting["student gathered, and two blocks"] = int(gathered)
        return lasting

    def gradient_bytes(self, role: str, gpus: int) -> dict[str, int]:
        return {"gradients of one network": self.master_bytes(role) // gpus}

    def kept_bytes(self, one: Pass) -> dict[str, int]:
        """Bytes that a pass keeps for its backward pass, with the K/V that it attends to."""
        size = self.sizes[one.role]
        over = self.clip.over(one.over)
        rows = self.config.batch.micro
        kept = {}
        if len(over.chunks) > 1:
            committed = self.clip.over("committed")
            kept["keys and values of the past"] = self.kv_bytes(one.role, committed) * rows
        what = self.config.model.activation_checkpointing
        if what != "none":
            inputs = size.num_layers * self.block_bytes(one.role, over) * rows
            kept["inputs of checkpointed blocks"] = inputs
            if what == "selective":
                kept["what attention gives, of all blocks"] = 2 * inputs  # to itself, to the text
        else:
            saved = size.num_layers * saved_bytes(size, over, self.width) * rows
            kept["activations of all blocks"] = saved
        return kept

    def again(self, one: Pass) -> int:
        """Bytes of one block's activations, and of its bf16 weights with their gradient.

        The gradient becomes float32 afterwards.
        """
        size = self.sizes[one.role]
        cast = 2 * 2 * num_parameters(size) // size.num_layers if self.width == 2 else 0
        saved = saved_bytes(size, self.clip.over(one.over), self.width)
        return saved * self.config.batch.micro + cast

    def block_bytes(self, role: str, clip: Clip) -> int:
        """What goes from one block to the next: D values a token."""
        size = self.sizes[role]
        return clip.tokens * size.num_heads * size.head_dim * self.width

    def kv_bytes(self, role: str, clip: Clip) -> int:
        """K/V of all layers: 2 D values a token."""
        return 2 * self.sizes[role].num_layers * self.block_bytes(role, clip)

    def passing_bytes(self, one: Pass) -> dict[str, int]:
        """Bytes of a pass where it needs most memory.

        That is either the rotated queries and keys (15 D values a token) or the inside of the
        feed-forward.
        """
        size = self.sizes[one.role]
        clip = self.clip.over(one.over)
        rows = self.config.batch.micro * one.rows
        dim = size.num_heads * size.head_dim
        token = self.width * max(15 * dim, 2 * size.ffn_dim + 3 * dim)
        return {f"a pass of {rows} row{'s' * (rows > 1)}": rows * clip.tokens * token}


def saved_bytes(size: NetworkConfig, clip: Clip, width: int) -> int:
    """What one block keeps for its backward pass, with the joined K/V that its chunks attend to.

    A token: 64 D + 4 D_ffn bytes in bf16 and 85 D + 8 D_ffn in float32, counted with
    saved_tensors_hooks (ten float32 values of width D come from norms, modulation, gates and
    rotations); 2 D values for each key that a chunk sees.
    """
    dim = size.num_heads * size.head_dim
    token = 64 * dim + 4 * size.ffn_dim if width == 2 else 85 * dim + 8 * size.ffn_dim
    seen = sum(own + before for own, before in zip(clip.chunks, clip.past, strict=True))
    joined = 2 * dim * seen * clip.frame_tokens * width if len(clip.chunks) > 1 else 0
    return clip.tokens * token + joined


def gpu_hours(flops: int, gpu: Gpu, mfu: float = MFU) -> float:
    peak = peak_tflops(gpu.name)
    assert peak is not None, f"cost.py knows no peak of {gpu.name}"
    return flops / (peak * 1e12 * mfu) / 3600


def fewest_gpus(estimate: Estimate, gpu: Gpu, most: int = 512) -> int | None:
    """The smallest power of two of these GPUs on which the run fits; None beyond `most`."""
    for gpus in powers_of_two(most):
        if estimate.memory(gpus).total <= gpu.gigabytes * 1e9:
            return gpus
    return None


def powers_of_two(most: int) -> Iterator[int]:
    gpus = 1
    while gpus <= most:
        yield gpus
        gpus *= 2
