"""What looks at a clip's frames and describes them: a model behind HTTP, or a template."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate.replies import MOST_TOKENS, PROMPT
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import IN_TURN, Factors, captions_by_level

KEY_VARIABLE = "OPENAI_API_KEY"
TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Reply:
    """finished: the model ended by itself and not at its token limit."""

    text: str
    finished: bool = True


class Captioner(Protocol):
    """Safe to share between threads."""

    @property
    def name(self) -> str:
        """What made the captions, for the record."""
        ...

    @property
    def num_pictures(self) -> int:
        """Frames of a clip that it looks at, evenly spaced; 0 is all of them."""
        ...

    def describe(self, pictures: Sequence[np.ndarray], seed: int) -> Reply:
        """Frames uint8 [H, W, 3] -> tagged captions. Raises UserError if nothing can answer."""
        ...


class TinyCaptioner:
    """Reads the factors of a tiny-world clip from its pixels and puts them into templates."""

    name = "tiny world"
    num_pictures = 0

    def describe(self, pictures: Sequence[np.ndarray], seed: int) -> Reply:
        """No text for a clip that shows no shape of the tiny world."""
        video = torch.from_numpy(np.stack(pictures))[None].float() / 255
        reading = read(video)
        if not bool(reading.valid):
            return Reply("")
        nowhere = torch.zeros(1)
        factors = Factors(
            shape=reading.shape,
            hue=reading.hue,
            direction=reading.direction,
            speed=reading.speed,
            size=reading.size,
            saturation=reading.saturation,
            x=nowhere,
            y=nowhere,
        )
        captions = captions_by_level(factors)
        return Reply("\n".join(f"[{level.upper()}] {captions[level]}" for level in IN_TURN))


@dataclass(frozen=True, slots=True)
class HttpCaptioner:
    """A model behind the chat completions of OpenAI's protocol: vLLM, SGLang, llama.cpp, others.

    url: up to and with `/v1`. tries: of a request before it is an error; waits double from wait_s.
    A key in the environment variable OPENAI_API_KEY is sent along.
    """

    url: str
    model: str
    num_pictures: int = 8
    temperature: float = 0.7
    top_p: float = 0.8
    max_tokens: int = MOST_TOKENS
    timeout_s: float = 300.0
    tries: int = 5
    wait_s: float = 1.0

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise UserError(
                f"--url is {self.url!r}; want the address of a server such as "
                "http://localhost:8000/v1"
            )

    @property
    def name(self) -> str:
        return self.model

    def describe(self, pictures: Sequence[np.ndarray], seed: int) -> Reply:
        answer = self._post(self._body(pictures, seed))
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            return Reply(str(text), choice.get("finish_reason") != "length")
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{self.url} answered {json.dumps(answer)[:200]}; want a chat completion with "
                "choices, as servers with OpenAI's protocol give it"
            ) from error

    def _body(self, pictures: Sequence[np.ndarray], seed: int) -> bytes:
        shown = [{"type": "image_url", "image_url": {"url": _as_url(one)}} for one in pictures]
        messages = [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": [*shown, {"type": "text", "text": "Describe this clip."}]},
        ]
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> Any:
        """The server's answer. UserError for none, after all tries, and for a refusal at once."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                with urlopen(request, timeout=self.timeout_s) as answer:
                    return json.load(answer)
            except HTTPError as error:
                problem = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
                if error.code not in TRY_AGAIN:
                    break
            except (OSError, HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{request.full_url}: {problem}. Captions so far are kept: run the same command again "
            "when the server answers"
        )


def _as_url(picture: np.ndarray) -> str:
    """A frame as a JPEG inside of a URL."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
