"""Feature scores of video files: diversity by prompt, other sets, text, and nearest clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.video import rate_of
from selfforcing_dfd.metrics.backbones import ClipEncoder, DinoEncoder
from selfforcing_dfd.metrics.distribution import (
    NEAREST_DENSITY,
    Memory,
    density_and_coverage,
    memorisation,
    mmd,
    precision_and_recall,
    vendi,
)
from selfforcing_dfd.metrics.diversity import diversity_scores
from selfforcing_dfd.metrics.features import (
    PLACES,
    Encoder,
    JoinedEncoder,
    MotionEncoder,
    PixelEncoder,
    Sampled,
    pooled,
    sample,
    standardised,
    unit,
)
from selfforcing_dfd.metrics.files import frames_of, stated
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

WEIGHTLESS: dict[str, Callable[[], Encoder]] = {"pixels": PixelEncoder, "motion": MotionEncoder}
WITH_WEIGHTS = ("clip", "clip_projected", "dino")
FEWEST = NEAREST_DENSITY + 1  # clips of a set that is compared with another


def encoder_of(text: str, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of `pixels`, `motion`, `clip=DIR`, `clip_projected=DIR`, `dino=DIR`.

    `A+B` joins two. Raises UserError for another name and for a folder without that model.
    """
    parts = [one_encoder(part, device) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else JoinedEncoder(parts)


def one_encoder(text: str, device: torch.device | str) -> Encoder:
    name, _, folder = text.partition("=")
    if name in WEIGHTLESS and not folder:
        return WEIGHTLESS[name]()
    if name in WITH_WEIGHTS and folder:
        if name == "dino":
            return DinoEncoder(Path(folder), device)
        return ClipEncoder(Path(folder), "clip" if name == "clip" else "clip_projected", device)
    raise UserError(
        f"features are {text!r}; want pixels, motion, clip=FOLDER, clip_projected=FOLDER or "
        "dino=FOLDER, or several joined by +"
    )


@dataclass(frozen=True, slots=True)
class Encoded:
    """Features of a set of videos: unit vectors [N, K, D], of frames as they are and standardised.

    The latter are empty for sets whose diversity is not asked for.
    """

    files: Sequence[Path]
    frames: Tensor
    standardised: Tensor

    @property
    def clips(self) -> Tensor:
        return pooled(self.frames)


def sample_file(path: Path, fps: float | None = None, places: int = PLACES) -> Sampled:
    """The frames of a video that encoders see. ClipError for one that cannot be read.

    The video is decoded twice, so that few frames are in memory at a time.
    """
    count = sum(1 for _ in frames_of(path))
    if not count:
        raise ClipError(path.name, "has no frame; leave it out")
    rate = fps or rate_of(path)
    if not rate:
        raise ClipError(path.name, "states no frames a second; give --fps")
    return sample(frames_of(path), count, float(rate), places)


def encode_files(
    files: Sequence[Path],
    encoders: Sequence[Encoder],
    fps: Fraction | None = None,
    both: bool = False,
    seen: Callable[[Path], object] = lambda path: None,
) -> list[Encoded]:
    """Features of a set by each encoder. both: also of standardised frames.

    seen: called with every video that was encoded. UserError where the encoder cannot take a video.
    """
    usual: list[list[Tensor]] = [[] for _ in encoders]
    standard: list[list[Tensor]] = [[] for _ in encoders]
    for path in files:
        clip = sample_file(path, float(fps) if fps else None)
        matched = standardised(clip) if both else None
        try:
            for number, encoder in enumerate(encoders):
                usual[number].append(unit(encoder(clip).float()))
                if matched is not None:
                    standard[number].append(unit(encoder(matched).float()))
        except ValueError as error:
            raise ClipError(path.name, f"{error}; leave it out") from error
        seen(path)
    return [
        Encoded(files, torch.stack(frames), torch.stack(others) if others else torch.empty(0))
        for frames, others in zip(usual, standard, strict=True)
    ]


def texts_beside(files: Iterable[Path]) -> dict[Path, str]:
    """Prompts of the videos that have a text file of the same name beside them."""
    texts = {path: path.with_suffix(".txt") for path in files}
    return {
        path: " ".join(text.read_text(encoding="utf-8").split())
        for path, text in texts.items()
        if text.is_file()
    }


def prompts_of(files: Sequence[Path]) -> tuple[list[str], str]:
    """(the prompt of every video, where it is from).

    It is the text file of the same name beside it, or, where no video has one, the name of its
    folder. UserError where only some have one.
    """
    texts = texts_beside(files)
    if texts and len(texts) < len(files):
        without = next(path for path in files if path not in texts)
        raise UserError(
            f"{without} has no prompt in {without.stem}.txt beside it, though others have; "
            "write it, or remove all prompts to group videos by their folder"
        )
    if texts:
        return [texts[path] for path in files], "text"
    return [path.parent.name for path in files], "folder"


def set_scores(
    generated: Encoded,
    prompts: Sequence[str],
    reference: Encoded | None = None,
    training: Encoded | None = None,
    held_out: Encoded | None = None,
    seed: int = 0,
) -> tuple[dict[str, Score | float], Memory | None]:
    """(all scores of a set by one encoder, what is known of nearest training clips).

    reference: clips of the data, for precision, recall, density, coverage and MMD. UserError for
    sets that are too small.
    """
    scores: dict[str, Score | float] = {}
    scores |= diversity_scores(generated.frames, prompts, seed)
    standard = diversity_scores(generated.standardised, prompts, seed)
    scores |= {f"{name}_standardised": score for name, score in standard.items()}
    scores["vendi"] = vendi(generated.clips)
    if reference is not None:
        check_sizes(generated, reference)
        scores |= precision_and_recall(generated.clips, reference.clips, seed)
        scores |= density_and_coverage(generated.clips, reference.clips, seed)
        scores["mmd"] = mmd(generated.clips, reference.clips)
        scores["vendi_reference"] = vendi(reference.clips)
    if training is None or held_out is None:
        return scores, None
    memory = memorisation(generated.clips, training.clips, held_out.clips, seed)
    return scores | memory.scores(), memory


def check_sizes(generated: Encoded, reference: Encoded) -> None:
    for name, encoded in (("videos", generated), ("reference", reference)):
        if len(encoded.files) < FEWEST:
            raise UserError(
                f"{name}: {len(encoded.files)} clips are too few to compare with another set; "
                f"want {FEWEST} at least"
            )


def text_alignment(
    encoder: ClipEncoder, frames: Tensor, prompts: Sequence[str]
) -> tuple[Score, list[float]]:
    """(mean, and each video's mean over frames) of the cosine between frames and their prompt.

    frames: unit vectors [N, K, D] of `clip_projected`. A hundred times it is the CLIP score.
    """
    distinct = sorted(set(prompts))
    rows = [distinct.index(prompt) for prompt in prompts]
    vectors = encoder.texts(distinct)[rows]
    cosines = torch.einsum("nkd,nd->nk", frames, vectors).mean(dim=1)
    every = Resamples.draw(len(cosines), 0)
    return every.score(every.mean(cosines)), cosines.tolist()


def scores_as_json(scores: Mapping[str, Score | float]) -> dict[str, Any]:
    """Every score as {value, low, high, n}; one without an interval has its value alone."""
    found: dict[str, Any] = {}
    for name, score in scores.items():
        if isinstance(score, Score):
            found[name] = {
                "value": stated(score.value),
                "low": stated(score.low),
                "high": stated(score.high),
                "n": score.n,
            }
        else:
            found[name] = {"value": stated(score)}
    return found
