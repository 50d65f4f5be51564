"""The steps of a journey. Each says what it depends on, what it does, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from selfforcing_dfd.codecs.protocol import TextEncoder, VideoCodec
from selfforcing_dfd.common import atomic_folder, find_device, find_file, sha256_of, shipped
from selfforcing_dfd.config import Config
from selfforcing_dfd.data import encoders
from selfforcing_dfd.data.format import INDEX_NAME
from selfforcing_dfd.data.pack import PackOptions, check_early, pack
from selfforcing_dfd.data.write import PackSummary
from selfforcing_dfd.journey.measure import card_rows, evaluate
from selfforcing_dfd.journey.recipes import Plan
from selfforcing_dfd.journey.record import clips_hash, text_hash
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.journey.upload import upload
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.streaming.export import export_run
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.identity import hash_of_weights
from selfforcing_dfd.weights.runs import FAKE_FILE, STUDENT_FILE

CODEC_FILE = "codec.safetensors"
SHARD_SIZES = {"tiny": 512, "wan": 128}
Train = Callable[[Config, bool], None]
"""(config, whether to go on) -> trains a run, as the command `train` does it."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    inputs: what it depends on, by name; asked when its turn comes. run: does it and returns the
    files that it leaves, in the journey's folder. refuses_change: whether other inputs than before
    are an error, since what is there took long; else it is done again.
    """

    name: str
    about: str
    inputs: Callable[[], Mapping[str, str]]
    run: Callable[[], list[Path]]
    refuses_change: bool = False


def steps_of(request: Request, plan: Plan, train: Train, say: Say) -> list[Step]:
    """All steps, in order."""
    steps = [pack_step(request, plan, say)]
    steps += [train_step(name, request, config, train) for name, config in plan.runs.items()]
    steps += [evaluation_step(request, plan), export_step(request, plan)]
    if request.push_to:
        steps.append(push_step(request, say))
    return steps


def pack_step(request: Request, plan: Plan, say: Say) -> Step:
    frames = plan.num_video_frames
    height, width = plan.size

    def inputs() -> dict[str, str]:
        source = request.clips(frames, plan.size, False)
        return {
            "videos and captions": clips_hash(source.clips),
            "clip": f"{frames} frames of {height}x{width}, {source.settings['resize']}, "
            f"fps {source.settings['fps']}",
            "model": "" if request.model is None else model_hash(request.model),
        }

    def run() -> list[Path]:
        index = request.shards / INDEX_NAME
        # a stop after the last shard; the folder appears as a whole
        if not index.is_file():
            say(packed(request, plan).account)
        return [index]

    about = f"videos into clips of {frames} frames of {height}x{width}, with their captions' text"
    return Step("pack", about, inputs, run, refuses_change=True)


def packed(request: Request, plan: Plan) -> PackSummary:
    """Cut and encode the videos; an interrupted run goes on after its last shard."""
    source = request.clips(plan.num_video_frames, plan.size, True)
    device = str(find_device(request.device))
    is_tiny = request.model is None
    name = "tiny" if is_tiny else "umt5"
    options = PackOptions(
        shard_size=SHARD_SIZES[plan.checkpoint.world],
        negative_prompt=encoders.default_negative_prompt(name),
        device=device,
        num_workers=request.workers,
        settings={"codec_dtype": "float32"},
        unfinished="resume",
    )
    check_early(source, request.shards, options)
    codec, attach = load_codec(request, plan, device)
    text: TextEncoder = encoders.load_text(name, request.model, device, request.text_cache)
    return pack(source, request.shards, codec, text, replace(options, attach=attach))


def load_codec(
    request: Request, plan: Plan, device: str
) -> tuple[VideoCodec, Callable[[Path], None] | None]:
    """The codec, and what writes its basis beside the shards."""
    if request.model is not None:
        return encoders.load_wan_codec(request.model, device, "float32"), None
    beside = find_file(plan.checkpoint.path).parent / CODEC_FILE
    basis = beside if beside.is_file() else shipped("assets/tiny") / CODEC_FILE
    codec = encoders.load_tiny_codec(basis)
    return codec.to(device), lambda folder: codec.save(folder / CODEC_FILE)


def train_step(name: str, request: Request, config: Config, train: Train) -> Step:
    stage = stage_of(config)
    result = run_folder(config) / (FAKE_FILE if name == "fake" else STUDENT_FILE)

    def inputs() -> dict[str, str]:
        starts = {start.path for start in stage.starts(config).values() if start.path}
        return {
            "settings": text_hash(to_yaml(config)),
            "weights": text_hash(" ".join(sorted(hash_of_weights(path) for path in starts))),
            "clips": sha256_of(request.shards / INDEX_NAME),
        }

    def run() -> list[Path]:
        train(config, True)
        return [result]

    updates = ", ".join(f"{count} {turn}" for turn, count in stage.updates(config).items())
    what = {"causal": "the causal teacher", "fake": "the fake score warms up"}
    return Step(name, f"{what.get(name, stage.about(config))}; updates: {updates}", inputs, run)


def evaluation_step(request: Request, plan: Plan) -> Step:
    student = run_folder(plan.student) / STUDENT_FILE

    def inputs() -> dict[str, str]:
        return {
            "student": sha256_of(student),
            "checkpoint": hash_of_weights(plan.checkpoint.path),
            "clips": sha256_of(request.shards / INDEX_NAME),
            "samples": f"{request.samples}, seed {plan.student.report.seed}",
        }

    def run() -> list[Path]:
        return [evaluate(request, plan, sha256_of(student))]

    about = f"{request.samples} samples of the student, of the checkpoint and of the data, measured"
    return Step("evaluate", about, inputs, run)


def export_step(request: Request, plan: Plan) -> Step:
    student = run_folder(plan.student) / STUDENT_FILE

    def inputs() -> dict[str, str]:
        return {
            "student": sha256_of(student),
            "evaluation": sha256_of(request.evaluation),
            "model": "" if request.model is None else model_hash(request.model),
        }

    def run() -> list[Path]:
        content = json.loads(request.evaluation.read_text(encoding="utf-8"))
        with atomic_folder(request.exported) as folder:
            export_run(
                run_folder(plan.student),
                request.model,
                folder,
                name=request.out.resolve().name,
                measured=card_rows(content),
            )
        return sorted(path for path in request.exported.rglob("*") if path.is_file())

    return Step(
        "export", f"a diffusers pipeline with its model card: {request.exported}", inputs, run
    )


def push_step(request: Request, say: Say) -> Step:
    def inputs() -> dict[str, str]:
        files = sorted(path for path in request.exported.rglob("*") if path.is_file())
        hashes = [f"{path.relative_to(request.exported)} {sha256_of(path)}" for path in files]
        return {"export": text_hash("\n".join(hashes)), "repository": request.push_to}

    def run() -> list[Path]:
        say(upload(request.exported, request.push_to, request.private))
        return []

    return Step("push", f"the export to {request.push_to} on the Hub", inputs, run)


def model_hash(model: Path) -> str:
    """Of what VAE, text encoder and tokenizer say of themselves, and of their weights' sizes."""
    lines = []
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in sorted((model / part).glob("*")):
            is_text = path.suffix == ".json"
            mark = sha256_of(path) if is_text else str(path.stat().st_size)
            lines.append(f"{part}/{path.name} {mark}")
    return text_hash("\n".join(lines))
