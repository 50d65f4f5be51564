"""Runs like those on Wan.

Weights in folders, a teacher of another size, a negative prompt, bfloat16, pairs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfforcing_dfd.cli.train import run
from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, ConfigError, NetworkConfig
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.format import INDEX_NAME, Index
from selfforcing_dfd.data.noise import store_noise
from selfforcing_dfd.data.pack import PackOptions, pack
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.ode import sample
from selfforcing_dfd.rng import normal
from selfforcing_dfd.stages import pairs
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.stages.init import InitStage
from selfforcing_dfd.stages.matching import MatchingStage
from selfforcing_dfd.stages.pairs import PairsStage
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import write_clips
from selfforcing_dfd.training.build import build_network, build_trainer, load_start
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.inversion import build_inversion
from selfforcing_dfd.training.one_run import build_guards
from selfforcing_dfd.training.tracking import read_metrics
from tests.tiny_models import fill_weights
from tests.training.conftest import MODEL

Settings = Callable[..., Config]

BF16 = ["model.compute=bfloat16", "model.activation_checkpointing=full"]


@pytest.fixture(scope="session")
def with_negative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips in shards that hold a negative prompt, as Wan's do."""
    folder = tmp_path_factory.mktemp("negative")
    write_clips(folder / "clips", 8, 0, "short", 33)
    codec = TinyCodec.load(shipped("assets/tiny/codec.safetensors"))
    options = PackOptions(negative_prompt="a grey disc stands still")
    source = FileSource(folder / "clips", 33, (64, 64))
    pack(source, folder / "shards", codec, TinyText(), options)
    return folder / "shards"


def as_of_another_codec(shards: Path, out: Path) -> Path:
    """The same shards, said to be made by another codec."""
    out.mkdir()
    for file in shards.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    index = Index.from_json((out / INDEX_NAME).read_text())
    index.fingerprints["codec"] = "wan-vae-of-this-test"
    (out / INDEX_NAME).write_text(index.to_json())
    return out


@pytest.mark.parametrize("stage", ["dmd", "init"])
def test_the_shards_negative_prompt_reaches_the_stage(
    settings: Settings, with_negative: Path, stage: str
) -> None:
    """Catches guidance by zeros on Wan.

    Its unconditional text is a prompt that is stored with the shards.
    """
    stages = build_trainer(settings(f"run.stage={stage}", f"data.shards={with_negative}")).stage
    assert isinstance(stages, MatchingStage | InitStage)
    assert stages.negative is not None
    assert torch.equal(
        stages.negative, TinyText().encode(["a grey disc stands still"])[0].half().float()
    )


def test_without_a_negative_prompt_it_is_zeros(settings: Settings) -> None:
    """Catches the tiny world's runs changing: their shards hold none."""
    stages = build_trainer(settings()).stage
    assert isinstance(stages, MatchingStage)
    assert stages.negative is None


def test_weights_come_from_a_diffusers_folder(
    settings: Settings, world: Path, tmp_path: Path
) -> None:
    """Catches a weights format that training cannot start from.

    A folder and a file give the same run.
    """
    teacher = load_start(Start(str(world / "teacher.safetensors")))
    teacher.save_pretrained(tmp_path / "diffusers")
    results = []
    for name, weights in (
        ("folder", tmp_path / "diffusers"),
        ("file", world / "teacher.safetensors"),
    ):
        config = settings(
            f"weights.teacher={weights}",
            f"run.name={name}",
            "run.student_updates=1",
            "run.stage=dmd",
        )
        run(config)
        results.append(load_file(run_folder(config) / "student.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_entries_choose_between_the_models_of_one_file(settings: Settings, tmp_path: Path) -> None:
    """Catches a fake score that starts from the student in the same Self-Forcing file."""
    models: dict[str, Any] = {}
    for seed, entry in enumerate(("generator", "critic")):
        network = build_network(MODEL)
        fill_weights(network, seed)
        models[entry] = {f"model.{name}": tensor for name, tensor in wan_names(network).items()}
    torch.save(models, tmp_path / "model.pt")
    both = tmp_path / "model.pt"
    fake = [f"weights.fake={both}", "weights.fake_entry=generator"]
    trainer = build_trainer(
        settings(
            f"weights.student={both}", "weights.student_entry=critic", "weights.head_dim=8", *fake
        )
    )
    for turn, entry in (("student", "critic"), ("fake", "generator")):
        own = trainer.learners[turn].network.get_parameter("patch_embedding.weight")
        assert torch.equal(own, models[entry]["model.patch_embedding.weight"]), turn


def wan_names(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    from selfforcing_dfd.weights.names import to_wan

    return {to_wan(name) or name: tensor for name, tensor in network.state_dict().items()}


def test_the_teacher_may_have_another_size(settings: Settings, tmp_path: Path) -> None:
    """Catches one size for all: Self-Forcing distils a 1.3B student from a 14B teacher."""
    large = NetworkConfig(num_heads=4, head_dim=8, num_layers=2, ffn_dim=48, freq_dim=16)
    teacher, student = build_network(large), build_network(MODEL)
    fill_weights(teacher, 3)
    fill_weights(student, 4)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    small = [f"weights.{role}={tmp_path / 'student'}" for role in ("student", "fake")]
    config = settings(f"weights.teacher={tmp_path / 'teacher'}", *small, "run.student_updates=1")
    run(config)
    assert (run_folder(config) / "student.safetensors").is_file()


def test_networks_of_different_data_are_refused(settings: Settings, tmp_path: Path) -> None:
    """Catches a teacher of another VAE or text encoder, whose answers would be nonsense."""
    other = build_network(NetworkConfig(num_heads=2, head_dim=8, num_layers=1, text_dim=16))
    other.save_pretrained(tmp_path / "other")
    own = tmp_path / "own"
    build_network(MODEL).save_pretrained(own)
    with pytest.raises(ConfigError, match=r"see different data.*teacher \(16, 16\)"):
        run(
            settings(
                f"weights.teacher={tmp_path / 'other'}",
                f"weights.student={own}",
                f"weights.fake={own}",
            )
        )


@pytest.mark.parametrize("stage", ["init", "dmd", "dfd"])
def test_a_run_in_bfloat16_keeps_float32_weights(settings: Settings, stage: str) -> None:
    """Catches bfloat16 weights, which lose an update of 2e-6, and losses that are not finite.

    All of them are logged.
    """
    config = settings(
        f"run.stage={stage}",
        *BF16,
        "run.student_updates=2",
        "optim.student.lr=2e-6",
        "optim.fake.lr=4e-7",
    )
    trainer = build_trainer(config, build_guards(config))
    before = {name: p.clone() for name, p in trainer.learners["student"].network.named_parameters()}
    trainer.run()
    for name, p in trainer.learners["student"].network.named_parameters():
        assert p.dtype == torch.float32
        assert not torch.equal(p, before[name]), f"{name} has not moved"
    lines = read_metrics(run_folder(config) / "metrics.jsonl")
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines)
    if isinstance(trainer.stage, MatchingStage):
        assert {p.dtype for p in trainer.stage.teacher.parameters()} == {torch.bfloat16}


def test_gradients_do_not_outlive_their_step(settings: Settings) -> None:
    """Catches both networks' gradients in memory at once: 5.7 GB at 1.3B without use."""
    trainer = build_trainer(settings("run.student_updates=1"))
    trainer.run()
    assert all(
        p.grad is None
        for learner in trainer.learners.values()
        for p in learner.network.parameters()
    )


@pytest.mark.parametrize("size", [1, 4])
def test_data_of_another_codec_are_guarded_as_latents(
    settings: Settings, world: Path, tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches the tiny codec used for Wan's latents, and the spread of a single clip.

    That spread is always zero and never a warning.
    """
    shards = as_of_another_codec(world / "shards", tmp_path / "other")
    batch = [f"batch.size={size}", "batch.micro=1"]
    config = settings(f"data.shards={shards}", "run.student_updates=1", *batch)
    with caplog.at_level(logging.INFO):
        run(config)
    assert "guards watch latents" in caplog.text
    line = next(
        line
        for line in read_metrics(run_folder(config) / "metrics.jsonl")
        if line["kind"] == "student"
    )
    assert ("spread_ratio" in line) == (size > 1)
    assert line["motion_ratio"] is not None and line["motion_ratio"] > 0


def pairs_config(settings: Settings, shards: Path, out: Path, *overrides: str) -> Config:
    return settings(
        "run.stage=pairs",
        f"pairs.out={out}",
        "pairs.steps=2",
        f"data.shards={shards}",
        "flow.shift=5",
        *overrides,
    )


def test_pairs_are_the_teachers_clips_with_their_noise(
    settings: Settings, with_negative: Path, tmp_path: Path
) -> None:
    """Catches pairs of wrong noise or guidance, and a negative prompt that is not copied."""
    config = pairs_config(settings, with_negative, tmp_path / "pairs", "pairs.num=6")
    run(config)
    source, made = ShardReader(with_negative), ShardReader(tmp_path / "pairs")
    made.verify()
    assert (len(made), made.has_noise, made.captions) == (6, True, source.captions[:6])
    assert (
        made.negative is not None
        and source.negative is not None
        and torch.equal(made.negative, source.negative)
    )
    teacher = load_start(Start(config.weights.teacher))
    noise = normal(source.index.latent_shape, 0, "pairs", 5)[None]
    text, negative = Conditioning(source[5].text[None]), Conditioning(source.negative[None])
    latents = sample(teacher, noise, text, 2, 5.0, 6.0, negative)[0]
    pair = made[5]
    assert pair.noise is not None and torch.equal(pair.noise, noise[0].half().float())
    # stored in float16; batches of 4 and of 1
    torch.testing.assert_close(pair.latents, latents, rtol=2e-3, atol=2e-3)
    assert torch.equal(pair.text, source[5].text)


def test_interrupted_pairs_go_on(
    settings: Settings, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of the teacher's ODE lost to a kill.

    Complete shards stay, and the result is that of an unbroken run.
    """
    monkeypatch.setattr(PairsStage, "pairs_per_shard", 4)
    whole, parts = (
        pairs_config(settings, world / "shards", tmp_path / name, "pairs.num=12")
        for name in ("whole", "parts")
    )
    run(whole)
    original, calls = pairs.make_pairs, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(pairs, "make_pairs", failing)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    run(parts, resume=True)
    assert len(calls) == 4, "shards that were complete were made again"
    hashes = [
        json.loads((tmp_path / name / INDEX_NAME).read_text())["shards"]
        for name in ("whole", "parts")
    ]
    assert hashes[0] == hashes[1]


def test_a_student_is_initialised_from_pairs(
    settings: Settings, world: Path, tmp_path: Path
) -> None:
    """Catches pairs that stage init does not read.

    Pairs, then init on the ladder, then DMD, end to end.
    """
    run(pairs_config(settings, world / "shards", tmp_path / "pairs"))
    init = settings(
        "run.stage=init",
        "run.name=init",
        "init.sigmas=ladder",
        f"data.shards={tmp_path / 'pairs'}",
        "run.student_updates=1",
    )
    stage = build_trainer(init).stage
    assert isinstance(stage, InitStage)
    assert (len(stage.sigmas), stage.num_stored_noise) == (4, 1)
    run(init)
    student = run_folder(init) / "student.safetensors"
    run(settings("run.stage=dmd", f"weights.student={student}", "run.student_updates=1"))


def test_causal_pairs_start_every_chunk(
    settings: Settings, world: Path, with_negative: Path, tmp_path: Path
) -> None:
    """Catches noise that belongs to more or less than the chunk that starts from it.

    A causal teacher: each chunk's depends on the clean chunks before and not on later ones. A
    bidirectional one: where first chunks start from stored noise, theirs depends on no later frame,
    and for whole clips on all.
    """
    causal = f"weights.causal={world / 'teacher.safetensors'}"
    latents, text = (
        ShardReader(with_negative)[0].latents[None],
        ShardReader(with_negative)[0].text[None],
    )
    fresh = torch.ones_like(latents)
    changed = latents.clone()
    changed[:, 6:] += 1

    def first_frame_that_differs(*overrides: str) -> int:
        invert = build_inversion(settings(*overrides), 2).invert
        differ = (invert(latents, text, fresh) != invert(changed, text, fresh)).flatten(2).any(2)
        return int(differ[0].int().argmax()) if differ.any() else latents.shape[1]

    all_chunks = ("run.stage=init", "init.stored_noise=all", causal)
    assert first_frame_that_differs(*all_chunks) == 6
    assert first_frame_that_differs("run.stage=init") == 9
    assert first_frame_that_differs("dfd.pairing=prefix") == 9
    assert first_frame_that_differs("dfd.pairing=inversion") == 0
    # of a comparison, the arms that need noise count
    control, prefix = "arms.a=[]", "arms.b=[dfd.pairing=prefix]"
    inversion = "arms.c=[dfd.pairing=inversion]"
    assert first_frame_that_differs(control, prefix) == 9
    assert first_frame_that_differs(control, inversion) == 0
    with pytest.raises(ConfigError, match=r"data\.shards of their own, or weights\.causal"):
        first_frame_that_differs(control, prefix, inversion)
    assert first_frame_that_differs(control, prefix, inversion, causal) == 6

    found = build_inversion(settings(*all_chunks), 2)
    store_noise(
        with_negative, found.invert, out=tmp_path / "noised", noise_fingerprint=found.fingerprint
    )
    stage = build_trainer(settings(*all_chunks, f"data.shards={tmp_path / 'noised'}")).stage
    assert isinstance(stage, InitStage)
    assert stage.num_stored_noise == 3


@pytest.mark.parametrize("override", ["init.stored_noise=all", "init.sigmas=ladder"])
def test_pairs_need_noise(
    settings: Settings, world: Path, with_negative: Path, override: str
) -> None:
    """Catches a few-step initialisation from fresh noise, whose few steps give a mean.

    That would silently be teacher forcing.
    """
    with pytest.raises(ConfigError, match=r"init\.stored_noise is .* holds no noise"):
        build_trainer(
            settings(
                "run.stage=init",
                override,
                f"weights.causal={world / 'teacher.safetensors'}",
                f"data.shards={with_negative}",
            )
        )


def test_a_plan_for_several_gpus_needs_as_many_processes(settings: Settings) -> None:
    """Catches a run that takes one of eight GPUs in silence."""
    wanted = r"run\.gpus is 8, but 1 process would train.*torchrun --nproc_per_node 8"
    with pytest.raises(ConfigError, match=wanted):
        run(settings("run.gpus=8"))
