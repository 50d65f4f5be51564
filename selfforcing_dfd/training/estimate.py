"""What a run costs, worked out from sizes before anything is loaded: memory of one GPU, operations
of an update, GPU-hours.

Arithmetic, not measurement. Operations are matrix products and attention, two for each
multiply-add. Bytes are those of tensors that are known to be alive at once; allocator and CUDA
context take some more, which is why a GPU's nominal size is taken for what fits: an 80 GB board has
85.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from selfforcing_dfd.config import Config, ModelConfig
from selfforcing_dfd.training.build import build_chunks, shape_of, sources, teacher_size

MASTER = 4  # bytes of a float32 weight, gradient, average or moment
PATCH = (2, 2)  # of Wan's transformer, height and width
MFU = 0.24
"""Share of the bf16 peak that training reaches. Self-Forcing's README: 600 iterations in under 2
hours on 64 H100, which by the operations below is 234 TFLOP/s a GPU.
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A board by its nominal memory and its dense bf16 peak (NVIDIA's data sheets)."""

    name: str
    gigabytes: int
    tflops: float


GPUS = (Gpu("H100", 80, 989.4), Gpu("H200", 141, 989.4), Gpu("A100", 80, 312.0))


@dataclass(frozen=True, slots=True)
class Clip:
    """A training clip as the networks see it. chunks: latent frames of each; past: latent frames
    each sees before itself.
    """

    chunks: tuple[int, ...]
    past: tuple[int, ...]
    frame_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        return sum(self.chunks) * self.frame_tokens

    @property
    def whole(self) -> Clip:
        """The same frames as one chunk: what a bidirectional network sees."""
        return Clip((sum(self.chunks),), (0,), self.frame_tokens, self.text_tokens)

    @property
    def committed(self) -> Clip:
        """All chunks but the last, whose keys and values nobody needs."""
        return Clip(self.chunks[:-1], self.past[:-1], self.frame_tokens, self.text_tokens)

    @property
    def pairs(self) -> int:
        """Queries times the keys they see."""
        seen = zip(self.chunks, self.past, strict=True)
        return sum(own * (own + before) for own, before in seen) * self.frame_tokens**2


def clip_of(config: Config, latent_size: tuple[int, int], text_tokens: int) -> Clip:
    """A clip of the config's chunks and window. latent_size: height and width."""
    rollout = config.rollout
    chunks = build_chunks(config)
    most = rollout.window - rollout.chunk_frames if rollout.window else rollout.frames
    past = tuple(min(chunk.start, most) for chunk in chunks)
    tokens = (latent_size[0] // PATCH[0]) * (latent_size[1] // PATCH[1])
    return Clip(tuple(chunk.frames for chunk in chunks), past, tokens, text_tokens)


@cache
def num_parameters(size: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in shape_of(size).parameters())


def forward_flops(size: ModelConfig, clip: Clip) -> int:
    """One pass over a clip, each chunk seeing its past and itself; the text's keys and values anew
    for each chunk's call.

    A token costs 2 (6 D^2 + 2 D D_ffn) in a block, q, k, v, o of self-attention, q, o of
    cross-attention and the feed-forward; a query and a key 4 D, a token and a text token likewise.
    """
    dim = size.num_heads * size.head_dim
    linear = 2 * clip.tokens * (6 * dim**2 + 2 * dim * size.ffn_dim)
    attention = 4 * dim * (clip.pairs + clip.tokens * clip.text_tokens)
    text = 2 * clip.text_tokens * (2 * dim**2 * size.num_layers + size.text_dim * dim + dim**2)
    ends = 2 * clip.tokens * dim * 2 * size.channels * PATCH[0] * PATCH[1]
    time = 2 * sum(clip.chunks) * (size.freq_dim * dim + 7 * dim**2)
    return size.num_layers * (linear + attention) + ends + text + time


def trained_flops(size: ModelConfig, clip: Clip) -> int:
    """A pass with gradient: forward, twice that backward, and forward once more where blocks are
    checkpointed.
    """
    return forward_flops(size, clip) * (4 if size.gradient_checkpointing else 3)


def rollout_flops(config: Config, clip: Clip) -> int:
    """The student's own clip: exit steps are drawn evenly, so half of the ladder and half a step on
    average; then commits.
    """
    steps = (len(config.rollout.ladder) + 1) / 2
    return int(steps * forward_flops(config.model, clip)) + commit_flops(config, clip)


def commit_flops(config: Config, clip: Clip) -> int:
    return forward_flops(config.model, clip.committed) if len(clip.chunks) > 1 else 0


def student_flops(config: Config, clip: Clip) -> dict[str, int]:
    """Operations of one student update for one sample, by what they are for."""
    own, whole, stage = config.model, clip.whole, config.run.stage
    teacher = forward_flops(teacher_size(config), whole)
    if stage == "pairs":
        return {
            "teacher's ODE": (2 * config.pairs.steps - 1)
            * teacher
            * (1 if config.pairs.guidance == 1 else 2)
        }
    if stage == "teacher":
        return {"with gradient": trained_flops(own, whole)}
    if stage == "init":
        return {"clean past": commit_flops(config, clip), "with gradient": trained_flops(own, clip)}
    return {
        "rollout": rollout_flops(config, clip),
        "replay with gradient": trained_flops(own, clip),
        "fake score": forward_flops(own, whole),
        "teacher": teacher * (1 if config.score.guidance == 1 else 2),
    }


def fake_flops(config: Config, clip: Clip) -> dict[str, int]:
    """Operations of one fake-score update for one sample; empty where none is trained."""
    if config.run.stage not in ("dmd", "dfd"):
        return {}
    return {
        "rollout": rollout_flops(config, clip),
        "with gradient": trained_flops(config.model, clip.whole),
    }


def run_flops(config: Config, clip: Clip, num_pairs: int = 0) -> int:
    """A whole run. num_pairs: samples of stage pairs, which has no updates."""
    one = sum(student_flops(config, clip).values())
    if config.run.stage == "pairs":
        return num_pairs * one
    both = one + config.score.fake_per_student * sum(fake_flops(config, clip).values())
    return config.run.student_updates * config.batch.size * both


def gpu_hours(flops: int, gpu: Gpu, mfu: float = MFU) -> float:
    return flops / (gpu.tflops * 1e12 * mfu) / 3600


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. lasting: all the time; phases: what is alive besides, by moment; the
    largest decides.
    """

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.lasting.values()) + sum(self.phases[self.peak_phase].values())


def estimate_memory(config: Config, clip: Clip, gpus: int = 1) -> Memory:
    """What lies in one GPU's memory when weights, moments, averages and gradients are sharded over
    `gpus`.

    Masters, gradients, average: 4 bytes a parameter each; AdamW's moments: 8; a frozen teacher: as
    it computes. With several GPUs the student is gathered for the rollout and each block of the
    others when its turn comes.
    """
    own, rows, stage = config.model, config.batch.micro, config.run.stage
    if stage == "pairs":
        frozen = {"teacher": frozen_bytes(config) // gpus}
        return Memory(
            frozen, {"teacher's ODE": passing(teacher_size(config), clip.whole, 2 * rows)}
        )
    size, matching = num_parameters(own) * MASTER, stage in ("dmd", "dfd")
    trained = 2 if matching else 1
    lasting = {
        f"weights of {trained} trained network{'s' * (trained > 1)}, float32": trained
        * size
        // gpus,
        "AdamW's two moments": trained * 2 * size // gpus,
        "average of the student (EMA)": size // gpus,
    }
    if matching:
        lasting["teacher"] = frozen_bytes(config) // gpus
    if gpus > 1:
        lasting["student gathered, and two blocks"] = int(
            (1 + 2 / own.num_layers) * num_parameters(own) * width(own)
        )
    causal = stage in ("init", "dmd", "dfd")
    past = {"keys and values of the past": kv_bytes(own, clip.committed) * rows} if causal else {}
    kept = {**past, "inputs of checkpointed blocks": own.num_layers * block_bytes(own, clip) * rows}
    if not own.gradient_checkpointing:
        kept = {**past, "activations of all blocks": own.num_layers * saved_bytes(own, clip) * rows}
    gradients = {"gradients of one network": size // gpus}
    phases = {
        "backward pass": {
            **kept,
            **gradients,
            "one block run again": saved_bytes(own, clip) * rows + cast_bytes(own),
        },
        "optimizer step": {**gradients, "its intermediate results": 2 * size // gpus},
    }
    if causal:
        phases["replay"] = {**kept, **gradients, **passing(own, clip, rows)}
    if matching:  # with gradients: of the micro-batches before this one
        phases["scores"] = {
            **kept,
            **gradients,
            **passing(teacher_size(config), clip.whole, 2 * rows),
        }
    return Memory(lasting, phases)


def width(size: ModelConfig) -> int:
    """Bytes of a value that the network computes with."""
    return 2 if size.compute == "bfloat16" else 4


def frozen_bytes(config: Config) -> int:
    return num_parameters(teacher_size(config)) * width(teacher_size(config))


def block_bytes(size: ModelConfig, clip: Clip) -> int:
    """What goes from one block to the next: D values a token."""
    return clip.tokens * size.num_heads * size.head_dim * width(size)


def kv_bytes(size: ModelConfig, clip: Clip) -> int:
    """Keys and values of all layers: 2 D values a token."""
    return 2 * size.num_layers * block_bytes(size, clip)


def saved_bytes(size: ModelConfig, clip: Clip) -> int:
    """What one block keeps for its backward pass, and the joined keys and values that its chunks
    attend to.

    A token: 64 D + 4 D_ffn bytes in bf16 and 85 D + 8 D_ffn in float32, counted with
    saved_tensors_hooks (ten float32 values of width D come from norms, modulation, gates and
    rotations); 2 D values for each key that a chunk sees.
    """
    dim, bf16 = size.num_heads * size.head_dim, width(size) == 2
    token = 64 * dim + 4 * size.ffn_dim if bf16 else 85 * dim + 8 * size.ffn_dim
    keys = (
        sum(own + before for own, before in zip(clip.chunks, clip.past, strict=True))
        * clip.frame_tokens
    )
    joined = 2 * dim * keys * width(size) if len(clip.chunks) > 1 else 0
    return clip.tokens * token + joined


def cast_bytes(size: ModelConfig) -> int:
    """A block's weights in bf16 with their gradient, before it becomes float32."""
    return 2 * 2 * num_parameters(size) // size.num_layers if width(size) == 2 else 0


def passing(size: ModelConfig, clip: Clip, rows: int) -> dict[str, int]:
    """A pass without gradient at its widest: rotating queries and keys (30 D bytes a token) or the
    feed-forward's inside.
    """
    dim, value = size.num_heads * size.head_dim, width(size)
    token = max(15 * dim * value, (2 * size.ffn_dim + 3 * dim) * value)
    return {f"a pass of {rows} row{'s' * (rows > 1)}": rows * clip.tokens * token}


def fewest_gpus(config: Config, clip: Clip, gpu: Gpu, most: int = 512) -> int | None:
    """The smallest power of two of these GPUs on which the run fits when sharded; None beyond
    `most`.
    """
    for gpus in powers_of_two(most):
        if estimate_memory(config, clip, gpus).total <= gpu.gigabytes * 1e9:
            return gpus
    return None


def powers_of_two(most: int) -> Iterator[int]:
    gpus = 1
    while gpus <= most:
        yield gpus
        gpus *= 2


def role_parameters(config: Config) -> dict[str, int]:
    """Parameters of each network of the stage."""
    sizes = {
        role: teacher_size(config) if role == "teacher" else config.model
        for role in sources(config)
    }
    return {role: num_parameters(size) for role, size in sizes.items()}
