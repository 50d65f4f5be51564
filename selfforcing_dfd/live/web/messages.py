"""Messages between the live page and its server. A wrong message is answered by an error.

To the server, as JSON: `start {prompt, seed, changes}` (changes may be left out: later prompts,
each `{chunk, text, mode}` with the first chunk of the stream that has it), `prompt {text, mode}`,
`pause`, `resume`, `reset`, `seed {seed}` (of the next reset), `student {name}` (begin anew with
that one, under the same prompt and seed; before the start: begin with it), `drop_picture` (begin
anew without the picture that was sent) and `ack {chunk}`: that chunk, and all before it, has been
shown. `type` names the message.

From the server, as JSON: `hello` (the students with their sizes, and limits), `began` (a start, a
reset, another student or picture; frames of chunks before `next_chunk` need not be shown, and are
to be acknowledged), `prompt` (accepted or, `is_planned`, one of the start's; with the first chunk
it holds for; frames of the chunks between `keep` and that one are not to be shown), `picture`
(accepted, before a start), `state`, `chunk` (figures; its video frames follow), `error`, `alive`
(nothing, but in time) and `ended`. Each video frame is one binary message: `HEADER`, then a JPEG.
Chunks and video frames are counted from the start of the connection, so that a number means the
same chunk before and after a reset or another student. Who watches another's stream gets that one's
numbers, and some of its chunks may be left out.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image

from selfforcing_dfd.live.web.script import MAX_CHANGES
from selfforcing_dfd.streaming.session import PromptMode

HEADER = struct.Struct("<II")
"""Chunk and video frame, before each JPEG."""

MAX_TEXT = 2000
MAX_MESSAGE_BYTES = 16 * 1024
MAX_SEED = 2**53 - 1  # what a browser's numbers hold exactly
JPEG_QUALITY = 92
FIELDS: dict[str, dict[str, str]] = {
    "start": {"prompt": "text", "seed": "number", "changes": "changes"},
    "prompt": {"text": "text", "mode": "mode"},
    "pause": {},
    "resume": {},
    "reset": {},
    "seed": {"seed": "number"},
    "student": {"name": "text"},
    "drop_picture": {},
    "ack": {"chunk": "number"},
}
OPTIONAL = ("changes",)
CHANGE = {"chunk": "number", "text": "text", "mode": "mode"}
WANTED = {
    "text": f"a string of at most {MAX_TEXT:,} characters, without lone surrogates",
    "number": f"a whole number from 0 to {MAX_SEED}",
    "mode": f"one of {', '.join(get_args(PromptMode))}",
    "changes": f"at most {MAX_CHANGES} of chunk, text and mode, the chunks rising",
}


class BadMessage(ValueError):
    """A message that does not fit `FIELDS`; says what was got and what was wanted."""


@dataclass(frozen=True, slots=True)
class Message:
    kind: str
    fields: dict[str, Any]


def parse_message(raw: str | bytes) -> Message:
    """One message of a client. Raises BadMessage."""
    if isinstance(raw, bytes):
        raise BadMessage(f"got {len(raw):,} bytes of binary data; want JSON as text")
    size = len(raw.encode())
    if size > MAX_MESSAGE_BYTES:
        raise BadMessage(f"got a message of {size:,} bytes; want at most {MAX_MESSAGE_BYTES:,}")
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadMessage(
            f"got {short(raw)}, which is not JSON; want such as {{'type': 'pause'}}"
        ) from error
    if not isinstance(message, dict):
        raise BadMessage(f"got {short(message)}; want an object with a type")
    kind = message.pop("type", None)
    if not isinstance(kind, str) or kind not in FIELDS:
        raise BadMessage(f"got type {short(kind)}; want one of {', '.join(FIELDS)}")
    if not FIELDS[kind].keys() - OPTIONAL <= message.keys() <= FIELDS[kind].keys():
        got, wanted = (short(", ".join(names) or "nothing") for names in (message, FIELDS[kind]))
        raise BadMessage(f"{kind} came with the fields {got}; want {wanted}")
    for name, value in message.items():
        form = FIELDS[kind][name]
        if not fits(value, form):
            raise BadMessage(f"{kind}: {name} is {short(value)}; want {WANTED[form]}")
    return Message(kind, message)


def fits(value: Any, form: str) -> bool:
    """Whether a field's value is what `WANTED` says."""
    if form == "text":
        has_fit = isinstance(value, str) and len(value) <= MAX_TEXT
        return has_fit and not any("\ud800" <= c <= "\udfff" for c in value)
    if form == "number":
        return type(value) is int and 0 <= value <= MAX_SEED  # a bool is no number here
    if form == "changes":
        return are_changes(value)
    return value in get_args(PromptMode)


def are_changes(value: Any) -> bool:
    """Whether these are prompts in the order of their chunks."""
    if not isinstance(value, list) or len(value) > MAX_CHANGES:
        return False
    for each in value:
        if not isinstance(each, dict) or each.keys() != CHANGE.keys():
            return False
        if not all(fits(each[name], form) for name, form in CHANGE.items()):
            return False
    chunks = [each["chunk"] for each in value]
    return all(one < other for one, other in itertools.pairwise(chunks))


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({len(text):,} characters)"


def message_text(kind: str, **fields: Any) -> str:
    """A message of the server."""
    return json.dumps({"type": kind, **fields})


def encode_jpeg(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as JPEG with full colour resolution, which small pictures need at edges."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
