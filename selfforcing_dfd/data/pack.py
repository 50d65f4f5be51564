"""From a source to a folder of shards.

An item that cannot be used is left out by name, with the reason, in the summary and in the index.
Threads may read ahead of the encoders; neither order nor bytes depend on how many.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from selfforcing_dfd.codecs.protocol import TextEncoder, VideoCodec
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.elsewhere import Elsewhere, latents_of, read_item
from selfforcing_dfd.data.format import LATENT, NEGATIVE_NAME, PackError, load_npy, npy, trim
from selfforcing_dfd.data.levels import text_member
from selfforcing_dfd.data.source import ClipError, DamagedClipError, Item, Latents, Source
from selfforcing_dfd.data.write import (
    Job,
    PackSummary,
    Record,
    Refusal,
    Refuse,
    Unfinished,
    check_target,
    none_usable,
    write_folder,
)

LATENT_STRIDE = 4  # video frames of each latent frame but the first, in all imported data sets

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How to pack.

    shard_size: samples in each shard. dtype: of the stored arrays. negative_prompt: is encoded
    into `negative.safetensors`; None for none. device: where the codec is. num_workers: threads
    that read ahead. part: i of n, counted from 1, for several machines (see `merge`). settings:
    more for the index that a resumed run must share, such as the codec's dtype. strict: the first
    item that cannot be used is a PackError. overwrite: replaces an earlier folder. unfinished: see
    `write.Unfinished`. attach: writes further files, such as the codec's basis, into the folder.
    elsewhere: where videos are encoded, if not here; then num_workers does not matter.
    """

    shard_size: int = 512
    dtype: str = "float16"
    negative_prompt: str | None = None
    device: torch.device | str = "cpu"
    num_workers: int = 0
    part: tuple[int, int] = (1, 1)
    settings: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    overwrite: bool = False
    unfinished: Unfinished = "discard"
    attach: Callable[[Path], None] | None = None
    elsewhere: Elsewhere | None = None


DEFAULTS = PackOptions()


def pack(
    source: Source,
    out: Path | str,
    codec: VideoCodec | None = None,
    text: TextEncoder | None = None,
    options: PackOptions = DEFAULTS,
) -> PackSummary:
    """Encode what is not encoded yet, and write shards of all items in their order.

    codec: needed for a source of video. text: encodes the captions; without it the embeddings of
    the source are taken. A sample that has an embedding and no caption gets a caption made of the
    embedding's hash, so that samples of one prompt still count as such.

    Raises PackError if `out` exists, if no item can be used, if the interrupted run to go on with
    was another one, or if there are neither embeddings nor an encoder. Raises the codec's
    ValueError for a video length or size that it cannot take.
    """
    packer = _Packer(
        source=source,
        codec=codec,
        text=text,
        options=options,
        numbers=share_of(range(len(source.names)), options.part),
        names=share_of(source.names, options.part),
        keys=share_of(source.keys, options.part),
        text_shape=_text_shape(source, text),
        fingerprints=_fingerprints(source, codec, text),
    )
    summary = write_folder(
        out, packer.job(), packer.records, options.overwrite, options.unfinished, options.attach
    )
    return replace(
        summary,
        skipped=tuple(source.skipped),
        longer=packer.left["files"],
        frames_left=packer.left["frames"],
    )


def check_early(source: Source, out: Path | str, options: PackOptions) -> None:
    """What can be refused before encoders are loaded, which may take minutes.

    Reads items up to the first that can be used. Raises PackError if there is none, or if `out`
    is in the way.
    """
    if options.unfinished != "resume":
        check_target(Path(out), options.overwrite, options.unfinished)
    if options.part != (1, 1):
        return  # a part may be empty
    refused = []
    for number, name in enumerate(source.names):
        try:
            source.read(number)
            return
        except ClipError as error:
            refused.append(_refusal(name, error))
    raise none_usable(source.title, len(refused), refused)


def share_of(items: Sequence[T], part: tuple[int, int]) -> Sequence[T]:
    """Part i of n, counted from 1: consecutive items, so that all parts in order are the whole."""
    number, count = part
    if not 1 <= number <= count:
        raise PackError(f"part {number}/{count} does not exist; want 1/{count} to {count}/{count}")
    first = len(items) * (number - 1) // count
    end = len(items) * number // count
    return items[first:end]


@dataclass(frozen=True, slots=True)
class _Packer:
    """One call of `pack`. `_read` may run in any thread, all else in the encoders' own.

    A position counts within this part. numbers, names, keys: the source's, by position. left:
    counts files that are long enough for more samples, and their unused frames.
    """

    source: Source
    codec: VideoCodec | None
    text: TextEncoder | None
    options: PackOptions
    numbers: Sequence[int]
    names: Sequence[str]
    keys: Sequence[str]
    text_shape: tuple[int, ...]
    fingerprints: dict[str, str]
    left: Counter[str] = field(default_factory=Counter)

    def job(self) -> Job:
        options = self.options
        settings = {
            **self.source.settings,
            "dtype": options.dtype,
            **options.settings,
            "shard_size": options.shard_size,
        }
        if self.source.levels:
            settings["captions"] = list(self.source.levels)
        files, about_negative = self._negative()
        about = {"source": self.source.about, "settings": settings, **about_negative}
        is_part = options.part != (1, 1)
        if is_part:
            about["part"] = "{}/{}".format(*options.part)
        return Job(
            name=self.source.title,
            num_items=len(self.numbers),
            latent_shape=self._latent_shape(),
            text_shape=self.text_shape,
            fingerprints=self.fingerprints,
            about=about,
            shard_size=options.shard_size,
            files=files,
            may_be_empty=is_part,
        )

    def records(self, first: int, refuse: Refuse) -> Iterator[Record]:
        """See `write.Records`."""
        positions = range(first, len(self.numbers))
        items = self._items(positions)
        bar = tqdm(
            zip(positions, items, strict=True),
            desc="packing",
            total=len(self.numbers),
            initial=first,
            unit="item",
            disable=None,
        )
        steps = iter(bar)
        num_refused = 0
        while group := list(islice(steps, self.source.batch_size)):
            for position, result in self._encode(group):
                if isinstance(result, Record):
                    yield result
                    continue
                refusal = _refusal(self.names[position], result)
                if self.options.strict:
                    raise PackError(
                        f"{refusal.file}: {refusal.reason}. Repair it, or run without --strict"
                    ) from result
                refuse(position, refusal)
                num_refused += 1
                bar.set_postfix(refused=num_refused)

    def _items(self, positions: Sequence[int]) -> Iterator[Item | ClipError]:
        """The item of each position, or why there is none; read ahead."""
        elsewhere = self.options.elsewhere
        if elsewhere is None or self.codec is None:
            return in_order(self._read, positions, self.options.num_workers)
        numbers = [self.numbers[position] for position in positions]
        codec = self.fingerprints["codec"]
        found = elsewhere.items(self.source, numbers, codec, self.options.device)
        return (self._checked(*pair) for pair in zip(positions, found, strict=True))

    def _read(self, position: int) -> Item | ClipError:
        """The item, or why not. An error is a result, so that threads that read ahead go on."""
        return self._checked(position, read_item(self.source, self.numbers[position]))

    def _checked(self, position: int, item: Item | ClipError) -> Item | ClipError:
        """The item if it has the captions that are packed."""
        if isinstance(item, ClipError):
            return item
        if self.text and not item.caption:
            return ClipError(self.names[position], "no caption")
        missing = [level for level in self.source.levels if not item.captions.get(level)]
        if missing:
            return ClipError(self.names[position], f"no {' and no '.join(missing)} caption")
        return item

    def _encode(
        self, group: list[tuple[int, Item | ClipError]]
    ) -> Iterator[tuple[int, Record | ClipError]]:
        """The record of each item of a group, or why there is none."""
        usable = [(position, item) for position, item in group if isinstance(item, Item)]
        levels: tuple[str, ...] = self.source.levels or ("",)
        by_level = {level: iter(self._embeddings(usable, level)) for level in levels}
        for position, item in group:
            if isinstance(item, ClipError):
                yield position, item
                continue
            self._count_left(item)
            found = [(level, next(embeddings)) for level, embeddings in by_level.items()]
            texts = {level: text for level, text in found if isinstance(text, Tensor)}
            problems = [text for _, text in found if isinstance(text, ClipError)]
            yield position, problems[0] if problems else self._record(position, item, texts)

    def _count_left(self, item: Item) -> None:
        if item.frames_left and item.frames_left >= _num_video_frames(item):
            self.left.update(files=1, frames=item.frames_left)

    def _embeddings(self, items: list[tuple[int, Item]], level: str) -> list[Tensor | ClipError]:
        """[L, D] for each item; a caption that the encoder refuses takes no other with it."""
        if self.text is None:
            return [self._stored_embedding(position, item) for position, item in items]
        if not items:
            return []
        captions = [item.captions[level] if level else item.caption for _, item in items]
        try:
            return list(self.text.encode(captions))
        except ValueError as error:
            if len(items) == 1:
                return [ClipError(self.names[items[0][0]], str(error))]
        return [embedding for one in items for embedding in self._embeddings([one], level)]

    def _stored_embedding(self, position: int, item: Item) -> Tensor | ClipError:
        name = self.names[position]
        if item.text is None:
            problem = "no text embedding; name a text encoder with --text to encode the captions"
            return ClipError(name, problem)
        length, dim = self.text_shape
        if item.text.shape[1:] != (dim,) or len(item.text) > length:
            got = list(item.text.shape)
            wanted = list(self.text_shape)
            problem = f"its text embedding is {got}, that of the first sample {wanted}"
            return ClipError(name, problem)
        return item.text

    def _record(self, position: int, item: Item, texts: Mapping[str, Tensor]) -> Record:
        """texts: embeddings by level; of an only caption under an empty name."""
        name = self.names[position]
        dtype = self.options.dtype
        tokens = {level: npy(trim(text), dtype, name) for level, text in texts.items()}
        caption = item.caption or _made_up_caption(npy(texts[""], dtype, name))
        about: dict[str, Any] = {"caption": caption, "source": name}
        captions: dict[str, str] = {level: item.captions[level] for level in self.source.levels}
        if captions:
            about["captions"] = captions
        members: dict[str, bytes] = {}
        latents = self._latents(item)
        if latents is not None:
            members[LATENT] = npy(latents, dtype, name)
            about |= {"num_video_frames": _num_video_frames(item), **self.fingerprints}
        members |= {text_member(level): content for level, content in tokens.items()}
        members["json"] = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
        return Record(position, self.keys[position], caption, members, captions)

    def _latents(self, item: Item) -> Tensor | None:
        if item.video is None:
            return item.latents
        return latents_of(_needed(self.codec), item.video, self.options.device)

    def _latent_shape(self) -> tuple[int, ...]:
        """F, C, H, W of every sample; of video from a black clip.

        So a length or size that the codec cannot take fails first.
        """
        holds = self.source.holds
        if isinstance(holds, Latents):
            return holds.shape
        codec = _needed(self.codec)
        num_latent_frames = codec.num_latent_frames(holds.shape[0])
        black = torch.zeros(1, *holds.shape, 3, device=self.options.device)
        return (num_latent_frames, *codec.encode(black).shape[2:])

    def _negative(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The file that `ShardReader.negative` reads, by name, and what the index says of it."""
        prompt = self.options.negative_prompt
        tokens = self.source.negative
        if self.text:
            tokens = None if prompt is None else self.text.encode([prompt])[0]
        if tokens is None:
            return {}, {}
        rows = load_npy(npy(trim(tokens), self.options.dtype, "the negative prompt"))
        content = save({"text": torch.from_numpy(rows).contiguous()}, {"prompt": prompt or ""})
        about = {"prompt": prompt or "", "sha256": hashlib.sha256(content).hexdigest()}
        return {NEGATIVE_NAME: content}, {"negative": about}


def _refusal(name: str, error: ClipError) -> Refusal:
    return Refusal(name, error.reason, isinstance(error, DamagedClipError))


def _made_up_caption(embedding: bytes) -> str:
    """Equal for equal embeddings."""
    return f"embedding {hashlib.sha256(embedding).hexdigest()[:16]}"


def _num_video_frames(item: Item) -> int:
    if item.video is not None:
        return len(item.video)
    assert item.latents is not None
    return 1 + LATENT_STRIDE * (len(item.latents) - 1)


def _needed(codec: VideoCodec | None) -> VideoCodec:
    if codec is None:
        raise ValueError("this source holds video; pack needs a codec")
    return codec


def _text_shape(source: Source, text: TextEncoder | None) -> tuple[int, ...]:
    if text:
        return tuple(text.encode([""]).shape[1:])
    if source.text_shape is None:
        raise PackError(
            f"{source.title} holds prompts without embeddings; name a text encoder with --text"
        )
    return source.text_shape


def _fingerprints(
    source: Source, codec: VideoCodec | None, text: TextEncoder | None
) -> dict[str, str]:
    """A codec may take a second to work out its own, so this is done once.

    PackError for captions of several levels without an encoder.
    """
    if source.levels and text is None:
        raise PackError(
            f"{source.title} has captions of level {' and '.join(source.levels)} and at most one "
            "embedding for each clip; name a text encoder with --text"
        )
    holds = source.holds
    of_latents = holds.codec if isinstance(holds, Latents) else _needed(codec).fingerprint
    of_text = text.fingerprint if text else f"{source.title}-stored"
    return {"codec": of_latents, "text": of_text}
