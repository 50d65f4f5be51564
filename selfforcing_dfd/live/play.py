"""Playing a stream: from the options of the command line to a file, a pipe or a web page."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.sources.video import read_last_frames
from selfforcing_dfd.live import control as commands
from selfforcing_dfd.live.background import BackgroundWriter
from selfforcing_dfd.live.prompts import PromptSchedule
from selfforcing_dfd.live.ranks import ALONE, StreamRanks, refuse_ranks, shown_by, stream_ranks
from selfforcing_dfd.live.ready import (
    ask_saving,
    can_be_told,
    is_warmed_up,
    load_text,
    plan_prompts,
    readable_stdin,
    warm_up_aloud,
    warm_up_page,
)
from selfforcing_dfd.live.status import StatusLine
from selfforcing_dfd.live.web import shared as page
from selfforcing_dfd.live.writers import ReaderGone, Writer, open_writer
from selfforcing_dfd.models.identity import Recipe, recipe_of
from selfforcing_dfd.streaming.decoders import compare_decoders, shared, with_decoder
from selfforcing_dfd.streaming.load import (
    TINY_DMD_STUDENT,
    TINY_STUDENT,
    choose_kernel,
    load_settings,
    load_stream_model,
)
from selfforcing_dfd.streaming.session import PromptMode, StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.streaming.static_calls import with_graphs
from selfforcing_dfd.weights.recipes import asked_by

USER_ERRORS = (ValueError, OSError)
EXAMPLES = ("a disc moves", "a square moves", "a cross moves")
WAN_EXAMPLES = (
    "A red fox walks through fresh snow at dawn, its breath visible in the cold air. "
    "Low camera, shallow focus.",
    "Waves roll onto a black beach under heavy clouds, foam sliding back over the pebbles. "
    "Slow aerial shot.",
    "A woman in a yellow raincoat crosses a busy street at night, "
    "neon signs reflected in the wet asphalt.",
)
"""Long and concrete, as the students' training prompts are."""
TINY_BESIDE = (("DMD", str(TINY_DMD_STUDENT)),)
"""Name and file of the student that the page offers beside the tiny world's."""
# video frames of a clip to continue: five seconds at 16 a second, Wan's training length
MAX_CONTEXT_FRAMES = 81
PAUSE_POLL_S = 0.05


@dataclass(slots=True)
class Player:
    """One stream on its way to its writers, and the commands that change it between two chunks.

    ranks: the processes that make it; what the first one is told counts for all.
    """

    session: StreamSession
    schedule: PromptSchedule
    writers: list[Writer]
    status: StatusLine
    control: commands.Control = field(default_factory=commands.Control)
    stop: threading.Event = field(default_factory=threading.Event)
    ranks: StreamRanks = ALONE
    mode: PromptMode | None = None
    seed: int | None = None
    paused: bool = False

    def play(self, num_chunks: float) -> None:
        """Write that many chunks, those before a reset included, or until told to stop."""
        try:
            self._play(num_chunks)
        except ReaderGone:
            self.ranks.agree(([], True))  # the others have no reader, and wait for a word
            raise

    def _play(self, num_chunks: float) -> None:
        self._write(self.session.context_frames)
        done = 0
        while True:
            ends = self.stop.is_set() or done >= num_chunks
            told, is_over = self.ranks.agree((self.control.poll(), ends))
            if is_over or self._obey(told):
                return
            if self.paused:
                self.stop.wait(PAUSE_POLL_S)
                continue
            self._make_chunk()
            done += 1

    def _make_chunk(self) -> None:
        session = self.session
        planned = self.schedule.at(session.chunk_index) if session.chunk_index else None
        if planned is not None:
            session.set_prompt(planned, self.mode)
        chunk = session.next_chunk()
        self._write(chunk.frames)
        on_gpu = session.model.device.type == "cuda"
        self.status.update(
            chunk.chunk_index,
            len(chunk.frames),
            chunk.timings.total_ms,
            session.prompt,
            cuda_bytes=torch.cuda.memory_allocated(session.model.device) if on_gpu else None,
        )

    def _write(self, frames: torch.Tensor) -> None:
        if len(frames):
            for writer in self.writers:
                writer.write(frames)

    def _obey(self, told: list[commands.Command]) -> bool:
        """Carry out the commands that came since the last chunk; whether one was to quit."""
        for command in told:
            match command:
                case commands.NewPrompt(text):
                    self._set_prompt(text)
                case commands.Pause():
                    self.paused = True
                    self.status.pause()
                case commands.Resume():
                    self.paused = False
                    self.status.resume()
                case commands.Reset():
                    planned = self.schedule.first if len(self.schedule.prompts) > 1 else None
                    self.session.reset(planned, seed=self.seed)
                case commands.Seed(seed):
                    self.seed = seed
                case commands.Mode(mode):
                    self.mode = mode
                case commands.Quit():
                    return True
        return False

    def _set_prompt(self, text: str) -> None:
        """Answer a prompt: accepted, or refused by the model, which changes nothing."""
        try:
            self.session.set_prompt(text, self.mode)
        except ValueError as error:
            self.status.say(f"error {error}")
        else:
            self.status.say("ok prompt")


def stream(options: argparse.Namespace) -> None:
    """Generate and write until done. Raises USER_ERRORS, whose messages say what to do.

    Where torchrun started several processes, all make the stream and the first one writes it.
    """
    with stream_ranks(options.device) as (ranks, device):
        options.device = device
        stream_on(ranks, options)


def stream_on(ranks: StreamRanks, options: argparse.Namespace) -> None:
    """`stream` for one of the processes that make it together."""
    model, settings = prepare(options, ranks)
    schedule, model = plan_prompts(options, model, examples(options)[0])
    if ranks.agree(can_be_told(readable_stdin())):
        load_text(model)
    context = read_context(options, model)
    session = StreamSession(model, schedule.first, settings, context)
    if is_warmed_up(options, model):
        warm_up_aloud(session, context)
    with ExitStack() as stack:
        shown = stack.enter_context(shown_by(ranks, sys.stderr))
        stack.enter_context(_reader_may_leave())
        writers: list[Writer] = []
        if ranks.is_first:
            output = BackgroundWriter(open_writer(options.out, options.fps, options.overwrite))
            writers.append(stack.enter_context(output))
        shown.write(describe(options, model, session) + "\n")
        status = stack.enter_context(StatusLine(shown, options.fps))
        player = Player(session, schedule, writers, status, ranks=ranks)
        stack.enter_context(_stopping_on_signals(player.stop))
        if ranks.is_first:
            listen(player)
        player.play(options.chunks)
    if ranks.is_first and options.out != "-":
        sys.stderr.write(f"wrote {options.out}\n")


def listen(player: Player) -> None:
    """From now on lines of stdin are commands, where there is a stdin."""
    stdin = readable_stdin()
    if stdin is not None:
        commands.LineReader(stdin, player.control, player.status.say)
        if stdin.isatty():
            player.status.say(commands.HELP)


def serve(options: argparse.Namespace) -> None:
    """The web page, until Ctrl-C."""
    refuse_ranks("the web page")
    from selfforcing_dfd.live import access, server

    token = access.find_token(options.host, options.token_file)
    students = load_students(options)
    worker = page.one_thread()
    for student in students.values():
        load_text(student.model)
        if is_warmed_up(options, student.model):
            warm_up_page(student, examples(options)[0], worker)
    app = server.create_app(
        students, fps=options.fps, examples=examples(options), token=token, worker=worker
    )
    lines = [describe_model(name, student.model) for name, student in students.items()]
    lines.append(f"open {access.link(options.host, options.port, token)} (Ctrl-C ends it)")
    told = "\n".join(lines) + "\n"
    server.serve(app, options.host, options.port, lambda: sys.stderr.write(told))


def load_students(options: argparse.Namespace) -> dict[str, page.Student]:
    """The students that the page offers; the first one is shown first.

    All are loaded with the same options. Raises UserError for a name that is given twice.
    """
    first = student_name(options)
    beside = options.beside
    if beside is None:
        named = options.run or options.weights or options.model
        beside = () if named else TINY_BESIDE
    names = [first, *(name for name, _ in beside)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two students are called {name!r}; use another NAME in --beside NAME=FILE"
            )
    students = {first: page.Student(*prepare(options))}
    for name, file in beside:
        asked = argparse.Namespace(**{**vars(options), "run": None, "weights": file})
        model, settings = prepare(asked)
        if options.model:  # Wan's VAE and text encoder are large, and the same for all
            shown = students[first].model
            model = replace(model, codec=shared(model.codec, shown.codec), text=shown.text)
        students[name] = page.Student(model, settings)
    return students


def student_name(options: argparse.Namespace) -> str:
    """What the page calls the student of --run, --weights or --model, or the tiny world's."""
    given = options.run or options.weights or options.model or TINY_STUDENT
    path = Path(given).absolute()
    return path.name if path.is_dir() else path.stem


def prepare(
    options: argparse.Namespace, ranks: StreamRanks = ALONE
) -> tuple[StreamModel, StreamSettings]:
    """Model and settings that the options ask for; the model is shared by the ranks."""
    model = with_decoder(load_model(options), options.decoder, options.decoder_weights)
    settings = ask_settings(options, recipe_of(model.student.config))
    choose_kernel(model, settings, options.attention)
    ranks.share(model.student)
    compare_decoders(model, settings, examples(options)[0])
    if options.compile:
        model.compile()
    if options.cuda_graph:
        model = with_graphs(model)
    return model, settings


def ask_settings(options: argparse.Namespace, recipe: Recipe | None) -> StreamSettings:
    """Settings of a student with this recipe."""
    return load_settings(
        options.settings or "",
        default="default" if options.model else "tiny",
        recipe=recipe,
        seed=options.seed,
        window_frames=options.window,
        sink_frames=options.sink,
        positions=options.positions,
        on_prompt=options.on_prompt,
    )


def load_model(options: argparse.Namespace) -> StreamModel:
    """Real Wan for --model, else the tiny world. Raises UserError for contradicting options."""
    saving = ask_saving(options)
    recipe = asked_by(options)
    if options.model is None:
        only_with_model = {
            "--size": options.size,
            "--dtype": options.dtype,
            "--vae-device": options.vae_device,
            "--text-memory": options.text_memory,
            "--lean-vae": options.lean_vae,
        }
        given = [name for name, value in only_with_model.items() if value]
        if given:
            raise UserError(
                f"{', '.join(given)} without --model: the tiny world has one size; add --model DIR"
            )
        return load_stream_model(options.run, options.weights, options.device, recipe, saving)
    if options.run is not None:
        raise UserError(
            "both --model and --run are given; name the run's student by --weights instead of --run"
        )
    dtype = options.dtype or "auto"
    vae_device = options.vae_device or ""
    size = options.size or (None, None)
    from selfforcing_dfd.streaming.load_wan import load_wan_model

    return load_wan_model(
        options.model, options.weights, options.device, dtype, vae_device, size, recipe, saving
    )


def examples(options: argparse.Namespace) -> tuple[str, ...]:
    """Prompts that the model understands; the first one is the default."""
    return WAN_EXAMPLES if options.model else EXAMPLES


def read_context(options: argparse.Namespace, model: StreamModel) -> torch.Tensor | None:
    """The picture or the end of the clip that the stream begins with, [T, H, W, 3] in [0, 1]."""
    if options.image and options.video:
        raise UserError("both --image and --video are given; drop one of them")
    path = options.image or options.video
    if path is None:
        return None
    frames = read_last_frames(path, 1 if options.image else MAX_CONTEXT_FRAMES, model.video_size)
    return frames.float() / 255


def describe_model(name: str, model: StreamModel) -> str:
    """A student that is about to run, in one line."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{name}: {page.describe(model)}, {dtype}, attention {model.student.attention}"


def describe(options: argparse.Namespace, model: StreamModel, session: StreamSession) -> str:
    """What is about to run: the model, and the session's context and length."""
    weights = options.run or options.weights or options.model or "the tiny world's student"
    line = describe_model(str(weights), model)
    settings = session.settings
    length = "without end" if options.chunks == math.inf else f"{options.chunks} chunks"
    return (
        f"{line}\nK = {session.visible_frames} latent frames "
        f"(sink {settings.sink_frames} + window {settings.window_frames}, {settings.positions}), "
        f"{session.cache_bytes / 2**20:.1f} MiB of keys and values; {length} to {options.out}"
    )


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """End the stream after the current chunk on Ctrl-C or SIGTERM, at once on a second one."""

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """The end of a pipe's reader is the end of the stream and no error."""
    try:
        yield
    except ReaderGone:
        sys.stderr.write("the reader has gone; ended\n")
