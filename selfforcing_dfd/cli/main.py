"""The console command `selfforcing-dfd`: one list of commands, one place that runs them.

A command is one function: it adds its options to a parser and returns what to run. Its docstring is
its help. Heavy imports belong into what it returns, so that --help appears at once.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Sequence
from typing import NoReturn

import selfforcing_dfd
from selfforcing_dfd.cli import (
    blind_command,
    curate_command,
    data_commands,
    distil_command,
    doctor_command,
    evaluate_command,
    images_command,
    protocol_command,
    run_commands,
    stream_commands,
    study_command,
    vbench_command,
    weights_commands,
)
from selfforcing_dfd.cli.errors import EXIT_READER_GONE, end, guarded, reader_is_gone
from selfforcing_dfd.cli.options import Command
from selfforcing_dfd.cli.quiet import quieten
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError, tune_allocator

PROGRAM = "selfforcing-dfd"
NAME_WIDTH = 12

GROUPS: dict[str, tuple[Command, ...]] = {
    "train": (
        run_commands.train,
        run_commands.sample,
        distil_command.distil,
        run_commands.report,
        run_commands.picture,
        study_command.study,
        run_commands.rebuild,
    ),
    "stream": (stream_commands.stream, stream_commands.benchmark),
    "judge": (
        evaluate_command.evaluate,
        vbench_command.vbench,
        protocol_command.protocol,
        blind_command.blind,
    ),
    "data": (
        data_commands.clips,
        curate_command.curate,
        data_commands.pack,
        data_commands.prompts,
        data_commands.import_,
        data_commands.merge,
        data_commands.invert,
        images_command.images,
    ),
    "weights": (weights_commands.convert, weights_commands.export),
    "trust": (doctor_command.verify, doctor_command.inspect, doctor_command.doctor),
}


def name_of(command: Command) -> str:
    """`import_` is the command `import`, a word that Python keeps for itself."""
    return command.__name__.removesuffix("_")


def summary_of(command: Command) -> str:
    assert command.__doc__ is not None
    return " ".join(command.__doc__.split("\n\n")[0].split())


STEPS: dict[str, dict[str, Command]] = {
    "blind": blind_command.STEPS,
    "curate": curate_command.STEPS,
}
"""Commands that consist of steps, each with options of its own."""

COMMANDS = {name_of(command): command for group in GROUPS.values() for command in group}


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError, where argparse prints all options and ends the process."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After --help: a reader that has left is met here, and not at the end of the process."""
        if sys.stdout is not None:
            sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser_of(name: str, step: str = "") -> Parser:
    """The parser of one command or of one of its steps.

    `command` among the parsed options is what to run.
    """
    command = STEPS[name][step] if step else COMMANDS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name} {step}".rstrip(),
        description=inspect.getdoc(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command(parser))
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error was raised"
    )
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UserError for one that cannot be understood."""
    name, *rest = arguments
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        guess = f", did you mean {similar[0]}?" if similar else ";"
        raise UserError(f"there is no command {name}{guess} the commands are {', '.join(COMMANDS)}")
    if rest and rest[0] in STEPS.get(name, {}):
        return parser_of(name, rest[0]).parse_intermixed_args(rest[1:])
    return parser_of(name).parse_intermixed_args(rest)


def overview() -> str:
    """All commands, as --help shows them."""
    about = " ".join((selfforcing_dfd.__doc__ or "").split())
    lines = [f"usage: {PROGRAM} COMMAND ...", "", about]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name_of(command):{NAME_WIDTH}}{summary_of(command)}" for command in commands]
    lines += ["", f"{PROGRAM} COMMAND --help lists a command's options."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(words)
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return EXIT_READER_GONE


def run(words: list[str]) -> int:
    """A command line's exit code, after its work."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), flush=True)
        return 0
    if words[0] == "--version":
        print(f"{PROGRAM} {selfforcing_dfd.__version__}", flush=True)
        return 0
    try:
        options = parse(words)
    except UserError as error:
        return end(f"error: {error}", EXIT_USER_ERROR)
    tune_allocator()
    quieten()
    return guarded(options)
