"""What lies in one GPU's memory while a run trains, and when it is most: estimated from sizes.

Counted are the bytes of tensors that are alive at once. Each moment of a turn is a phase of its
own, and the largest decides. `tests/training/test_memory.py` trains in one and in two processes and
compares. The allocator and the CUDA context take some more. What fits is therefore judged by a
GPU's nominal size: a board of 80 GB has 85.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from selfforcing_dfd.config import Config, NetworkConfig, OptimizerConfig
from selfforcing_dfd.stages.base import Pass
from selfforcing_dfd.training.adapter_costs import adapter_values, roles_by_weights
from selfforcing_dfd.training.build import shape_of
from selfforcing_dfd.training.estimate import Clip, Estimate, Gpu, num_parameters
from selfforcing_dfd.training.optimizers import split_parameters

MASTER_BYTES = 4  # of a float32 weight, gradient, average or moment
Parts = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. lasting: all the time; phases: what is alive besides, by moment.

    The largest phase decides.
    """

    lasting: Parts
    phases: dict[str, Parts]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        return sum(self.lasting.values()) + sum(self.phases[self.peak_phase].values())


def memory_of(estimate: Estimate, gpus: int = 1) -> Memory:
    """What lies in the memory of each of `gpus` GPUs that train together."""
    return Spread(estimate, gpus).memory()


@dataclass(frozen=True, slots=True)
class Spread:
    """A run on `gpus` GPUs, as `training.sharding` spreads it.

    The student stays gathered during a turn. Of other networks one block is gathered while it runs,
    and the next one is on its way.
    """

    estimate: Estimate
    gpus: int = 1

    @property
    def config(self) -> Config:
        return self.estimate.config

    @property
    def ranks(self) -> int:
        """GPUs that hold one copy of the weights together."""
        return min(self.config.model.shard_ranks or self.gpus, self.gpus)

    @property
    def width(self) -> int:
        """Bytes of a value that the networks compute with."""
        return self.estimate.width

    @property
    def sequence_ranks(self) -> int:
        """GPUs that share the tokens of each sequence."""
        return min(self.config.model.sequence_ranks, self.gpus)

    @property
    def passes_of_update(self) -> int:
        """Micro-batches whose gradients each GPU adds up before they are reduced."""
        batch = self.config.batch
        return max(batch.size * self.sequence_ranks // (batch.micro * self.gpus), 1)

    @property
    def foreach(self) -> bool:
        """Whether AdamW's step takes all tensors at once, as torch does it on GPUs."""
        return self.config.run.device != "cpu"

    def memory(self) -> Memory:
        phases: dict[str, Parts] = {}
        for turn, passes in self.estimate.passes.items():
            phases |= self.turn(turn, passes)
        return Memory(self.lasting(), phases)

    def lasting(self) -> Parts:
        """Masters, moments, average: float32. A frozen network: as it computes."""
        trained = self.estimate.trained
        lasting = {}
        if trained:
            networks = f"{len(trained)} trained network{'s' * (len(trained) > 1)}"
            masters = sum(self.master_bytes(role) for role in trained)
            what = "adapters" if self.config.model.lora_rank else "weights"
            lasting[f"{what} of {networks}, float32"] = masters
            lasting["optimizers' moments"] = self.moment_bytes()
            lasting["average of the student (EMA)"] = self.master_bytes("student")
        for roles in self.frozen:
            values = num_parameters(self.estimate.sizes[roles[0]])
            lasting[", ".join(roles)] = values * self.width // self.ranks
        outer = sum(self.outer_bytes(roles[0]) for roles in roles_by_weights(self.config))
        if outer:
            lasting["outer layers that stay gathered"] = outer
        return lasting

    @property
    def frozen(self) -> list[list[str]]:
        """The roles of each copy of weights that are not trained; below adapters, all are such."""
        trained = () if self.config.model.lora_rank else self.estimate.trained
        return [roles for roles in roles_by_weights(self.config) if roles[0] not in trained]

    def is_students(self, role: str) -> bool:
        """Whether a role has the student's weights, which stay gathered during a turn."""
        return any({role, "student"} <= set(roles) for roles in roles_by_weights(self.config))

    def trained_values(self, role: str) -> int:
        """Of a network or of its adapter."""
        size = self.estimate.sizes[role]
        rank = self.config.model.lora_rank
        return adapter_values(size, rank) if rank else num_parameters(size)

    def outer_bytes(self, role: str) -> int:
        """Embeddings and head of a sharded network, which no block gives back.

        Of the student everything is gathered and counted elsewhere.
        """
        if self.is_students(role) or not self.is_sharded(role):
            return 0
        return outer_parameters(self.estimate.sizes[role]) * self.width

    def master_bytes(self, role: str) -> int:
        """A float32 value for each trained parameter that this GPU holds."""
        return self.trained_values(role) * MASTER_BYTES // self.ranks

    def moment_bytes(self) -> int:
        """Two moments a parameter with AdamW, one with Muon; every turn has optimizers."""
        optim = {
            "student": self.config.optim.student,
            "fake": self.config.optim.fake,
            "regression": self.config.optim.regression,
        }
        values = 0
        for turn, passes in self.estimate.passes.items():
            roles = {one.role for one in passes if one.gradient} & set(self.estimate.trained)
            for role in roles:
                if self.config.model.lora_rank:  # all are matrices
                    values += self.trained_values(role) * (1 if optim[turn].kind == "muon" else 2)
                else:
                    values += num_moments(self.estimate.sizes[role], optim[turn])
        return values * MASTER_BYTES // self.ranks

    def turn(self, turn: str, passes: list[Pass]) -> dict[str, Parts]:
        """What is alive besides, in each phase of a turn."""
        gathered = self.student_gathered(passes)
        trained = [one for one in passes if one.gradient and one.role in self.estimate.trained]
        if not trained:
            return {one.name: gathered | self.passing(one) for one in passes}
        own = trained[-1]
        sums = self.summed_bytes(own.role)
        kept: Parts = {}
        phases: dict[str, Parts] = {}
        for one in passes:
            if one.gradient:
                kept = added(kept, self.kept(one))
            else:
                alive = kept or self.history(one)
                phases[f"{one.name}, {turn} update"] = gathered | sums | alive | self.passing(one)
        again = self.again(own) | self.visiting(own.role) | self.reducing(own.role)
        gradients = {"gradients of one network": self.master_bytes(own.role)}
        phases[f"backward pass begins, {turn} update"] = gathered | sums | kept | again
        if self.is_students(own.role):
            gathered = {}  # is given back block by block
        phases[f"backward pass ends, {turn} update"] = gathered | gradients | again
        if sums:
            name = "student" if self.is_students(own.role) else own.role
            whole = {f"{name} gathered": self.gathered_bytes(own.role)}
            phases[f"between backward passes, {turn} update"] = gathered | sums | whole | again
        phases[f"optimizer step, {turn} update"] = gradients | self.stepping(own.role)
        return phases

    def is_sharded(self, role: str) -> bool:
        """Whether FSDP holds a network: float32 weights of one process stay as they are."""
        is_cast = self.width != MASTER_BYTES and role in self.estimate.trained
        return self.gpus > 1 or is_cast

    def gathered_bytes(self, role: str) -> int:
        """A whole network as it computes, beside what this GPU holds of it."""
        values = num_parameters(self.estimate.sizes[role])
        if self.config.model.lora_rank:
            sharing = next(roles for roles in roles_by_weights(self.config) if role in roles)
            adapted = set(sharing) & set(self.estimate.trained)
            values += len(adapted) * self.trained_values(role)
        return values * self.width * self.is_sharded(role)

    def student_gathered(self, passes: list[Pass]) -> Parts:
        if not self.is_sharded("student") or all(one.role != "student" for one in passes):
            return {}
        return {"student gathered": self.gathered_bytes("student")}

    def visiting(self, role: str) -> Parts:
        """Blocks that are gathered while they run: one, and one message to or from other GPUs.

        The student's are counted as a whole, but for the message.
        """
        if not self.is_sharded(role):
            return {}
        blocks = int(not self.is_students(role)) + int(self.ranks > 1)
        values = blocks * block_parameters(self.estimate.sizes[role])
        return {f"blocks of {role}, gathered": values * self.width} if values else {}

    def summed_bytes(self, role: str) -> Parts:
        """Whole float32 gradients: several micro-batches are added up before they are reduced."""
        if self.passes_of_update == 1:
            return {}
        return {"gradients of several passes, whole": self.trained_values(role) * MASTER_BYTES}

    def reducing(self, role: str) -> Parts:
        """A block's whole gradient, as computed and in float32 on its way to the others."""
        if not self.is_sharded(role):
            return {}
        values = block_parameters(self.estimate.sizes[role])
        if self.config.model.lora_rank:
            values = self.trained_values(role) // self.estimate.sizes[role].num_layers
        return {"a block's gradient on its way": values * (self.width + MASTER_BYTES)}

    def history(self, one: Pass) -> Parts:
        """K/V of all chunks but the last, which a pass over chunks attends to."""
        if len(self.estimate.clip.over(one.over).chunks) <= 1:
            return {}
        return {"keys and values of the past": self.kv_bytes(one.role, self.committed)}

    @property
    def committed(self) -> Clip:
        return self.estimate.clip.over("committed")

    def kept(self, one: Pass) -> Parts:
        """Bytes that a pass keeps for its backward pass, with the K/V that it attends to."""
        size = self.estimate.sizes[one.role]
        over = self.estimate.clip.over(one.over)
        kept = self.history(one)
        what = self.config.model.activation_checkpointing
        if what == "none":
            kept["activations of all blocks"] = size.num_layers * self.saved_bytes(size, over)
            return kept
        inputs = size.num_layers * self.block_bytes(one.role, over)
        kept["inputs of checkpointed blocks"] = inputs
        if what == "selective":
            attentions = 3 if size.image_dim else 2  # to itself, to the text, to a picture
            kept["what attention gives, of all blocks"] = attentions * inputs
        return kept

    def saved_bytes(self, size: NetworkConfig, clip: Clip) -> int:
        """What one block keeps of a micro-batch."""
        rows = self.config.batch.micro
        return rows * saved_bytes(size, clip, self.width) // self.sequence_ranks

    def again(self, one: Pass) -> Parts:
        """The activations of one block that is run again, or their gradients."""
        size = self.estimate.sizes[one.role]
        over = self.estimate.clip.over(one.over)
        if self.config.model.activation_checkpointing == "none":
            tokens = over.tokens * self.config.batch.micro // self.sequence_ranks
            return {"gradients inside one block": self.token_bytes(size) * tokens}
        return {"one block run again": self.saved_bytes(size, over)}

    def stepping(self, role: str) -> Parts:
        """Intermediate results of AdamW: a root of the second moment."""
        values = self.trained_values(role) // self.ranks if self.foreach else 0
        return {"the step's intermediate results": values * MASTER_BYTES}

    def block_bytes(self, role: str, clip: Clip) -> int:
        """What goes from one block to the next: D values a token of each row."""
        size = self.estimate.sizes[role]
        tokens = clip.tokens * self.config.batch.micro // self.sequence_ranks
        return tokens * size.num_heads * size.head_dim * self.width

    def kv_bytes(self, role: str, clip: Clip) -> int:
        """K/V of all layers: 2 D values a token."""
        return 2 * self.estimate.sizes[role].num_layers * self.block_bytes(role, clip)

    def passing(self, one: Pass) -> Parts:
        """Bytes of a pass without gradient where it needs most, with the blocks it gathers."""
        size = self.estimate.sizes[one.role]
        rows = self.config.batch.micro * one.rows
        tokens = self.estimate.clip.over(one.over).tokens // self.sequence_ranks
        name = f"a pass of {rows} row{'s' * (rows > 1)}"
        return {name: rows * tokens * self.token_bytes(size), **self.visiting(one.role)}

    def token_bytes(self, size: NetworkConfig) -> int:
        """A token inside a block: either rotated queries and keys, or the feed-forward.

        Values of the computing dtype, measured as resident memory; norms and rotations are float32.
        """
        dim = size.num_heads * size.head_dim
        if self.width == MASTER_BYTES:
            return self.width * max(14 * dim, 2 * size.ffn_dim + 9 * dim)
        return self.width * max(18 * dim, 2 * size.ffn_dim + 10 * dim)


def added(one: Parts, other: Parts) -> Parts:
    """What both hold, by what it is for."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def saved_bytes(size: NetworkConfig, clip: Clip, width: int) -> int:
    """What one block keeps for its backward pass, with the joined K/V that its chunks attend to.

    A token: 64 D + 4 D_ffn bytes in bf16 and 85 D + 8 D_ffn in float32, counted with
    saved_tensors_hooks (ten float32 values of width D come from norms, modulation, gates and
    rotations); 2 D values for each key that a chunk sees.
    """
    dim = size.num_heads * size.head_dim
    token = 64 * dim + 4 * size.ffn_dim if width == 2 else 85 * dim + 8 * size.ffn_dim
    token += width * dim if size.image_dim else 0  # what attention to the picture gives
    seen = sum(own + before for own, before in zip(clip.chunks, clip.past, strict=True))
    joined = 2 * dim * seen * clip.frame_tokens * width if len(clip.chunks) > 1 else 0
    return clip.tokens * token + joined


@cache
def block_parameters(size: NetworkConfig) -> int:
    """Of one transformer block."""
    blocks = shape_of(size).blocks
    return sum(parameter.numel() for parameter in blocks[0].parameters())


def outer_parameters(size: NetworkConfig) -> int:
    """Of what is not in a block: embeddings and the head."""
    return num_parameters(size) - size.num_layers * block_parameters(size)


@cache
def num_moments(size: NetworkConfig, optimizer: OptimizerConfig) -> int:
    """Values of one network's optimizers."""
    matrices, rest = split_parameters(shape_of(size), optimizer.kind)
    return sum(each.numel() for each in matrices) + 2 * sum(each.numel() for each in rest)


def fewest_gpus(estimate: Estimate, gpu: Gpu, most: int = 512) -> int | None:
    """The smallest power of two of these GPUs on which the run fits; None beyond `most`."""
    for gpus in powers_of_two(most):
        if memory_of(estimate, gpus).total <= gpu.gigabytes * 1e9:
            return gpus
    return None


def powers_of_two(most: int) -> Iterator[int]:
    gpus = 1
    while gpus <= most:
        yield gpus
        gpus *= 2
