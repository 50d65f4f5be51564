"""The console command: its list of commands, their options, and how fast its help is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import selfforcing_dfd
from selfforcing_dfd.cli.main import COMMANDS, GROUPS, main, name_of, parse, parser_of
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError, shipped
from selfforcing_dfd.config import ConfigError
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.training.plan import plan

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "omegaconf", "av", "webdataset")

SAME_MEANING = {
    "--checkpoint": set(),
    "--height": set(),
    "--out": {
        "evaluate",
        "stream",
        "benchmark",
        "pack",
        "prompts",
        "import",
        "merge",
        "sample",
        "report",
    }
    | {"picture", "rebuild", "distil", "vbench"},
    "--settings": {"stream", "benchmark"},
    "--size": {"stream", "benchmark", "pack", "prompts", "distil"},
    "--weights": {"stream", "benchmark"},
}
"""Commands that have an option of some name; it means the same in all of them."""


def start(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_in_its_group(arguments, capsys):
    """Catches a command that --help does not show."""
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for group, commands in GROUPS.items():
        listed = printed.split(f"\n{group}:\n")[1].split("\n\n")[0].splitlines()
        assert [line.split()[0] for line in listed] == [name_of(command) for command in commands]
    assert max(map(len, printed.splitlines())) <= 110


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_help(name):
    """Catches an option that --help lists without a word."""
    parser = parser_of(name)
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    parser.format_help()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_ends_with_success(name, capsys):
    """Catches a help text that argparse cannot format, such as one with a bare percent sign."""
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: selfforcing-dfd {name}" in capsys.readouterr().out


@pytest.mark.parametrize("option", sorted(SAME_MEANING))
def test_an_option_means_one_thing(option):
    """Catches a second name for a thing, and a second thing under a name."""
    having = {name for name in COMMANDS if option in parser_of(name)._option_string_actions}
    assert having == SAME_MEANING[option]


def test_options_of_two_commands_have_one_form():
    """Catches a size that is two numbers in one command and one text in another."""
    assert parse(["stream", "--size", "480x832"]).size == (480, 832)
    assert parse(["benchmark", "--size", "480x832"]).size == (480, 832)
    assert parse(["pack", "a", "--codec", "wan", "--size", "480x832"]).size == (480, 832)
    assert parse(["prompts", "a", "--out", "b", "--size", "480x832"]).size == (480, 832)


@pytest.mark.parametrize(
    "script",
    [
        ["-m", "selfforcing_dfd"],
        ["-m", "selfforcing_dfd", "pack"],
        ["train.py"],
        ["inference/stream.py"],
        ["inference/benchmark.py"],
    ],
)
def test_help_is_immediate(script):
    """Catches a heavy import at the top: torch alone takes seconds. One of three must be fast."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = start(*script, "--help")
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert "usage: selfforcing-dfd" in done.stdout
        if times[-1] < 1:
            break
    assert min(times) < 1


def test_no_command_imports_much_for_its_help():
    """Catches a heavy import that only one command's options need."""
    program = (
        "import sys\nfrom selfforcing_dfd.cli.main import COMMANDS, main, parser_of\n"
        "main(['--version'])\nmain(['--help'])\n"
        "for name in COMMANDS: parser_of(name).format_help()\n"
        f"print('heavy', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = start("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy"


def test_importing_the_package_is_light_and_its_names_are_there():
    """Catches an import of torch by `import selfforcing_dfd`, and a public name without a home."""
    program = "import sys, selfforcing_dfd\n"
    program += f"print([name for name in {HEAVY} if name in sys.modules])"
    assert start("-c", program).stdout == "[]\n"
    for name in selfforcing_dfd.__all__:
        assert getattr(selfforcing_dfd, name).__name__ == name
        assert name in dir(selfforcing_dfd)
    with pytest.raises(AttributeError, match="no attribute 'StreamSesion'"):
        selfforcing_dfd.__getattr__("StreamSesion")


def test_the_scripts_are_the_commands(capsys):
    """Catches a script that parses for itself, and drifts away from the console command."""
    for script, name in (
        ("train.py", "train"),
        ("inference/stream.py", "stream"),
        ("inference/benchmark.py", "benchmark"),
    ):
        done = start(script, "--no-such-option")
        assert done.returncode == EXIT_USER_ERROR
        assert main([name, "--no-such-option"]) == EXIT_USER_ERROR
        assert done.stderr == capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command trian, did you mean train?"),
        (["xyz"], "there is no command xyz; the commands are train, sample"),
        (["train"], "the following arguments are required: --config"),
        (["stream", "--checkpoint", "a"], "unrecognized arguments: --checkpoint"),
        (["stream", "--chunks", "0"], "'0' is neither a positive number nor inf"),
        (["stream", "--size", "480"], "'480', want HEIGHTxWIDTH such as 480x832"),
        (["stream", "--window", "0"], "--window is 0"),
        (["stream", "--device", "cuda:9"], "--device is cuda:9 but torch sees"),
        (["stream", "--positions", "relative"], "--positions is 'relative'"),
        (["stream", "--port", "80"], "add --serve, or drop it"),
        (["benchmark", "--window", "0"], "--window is 0"),
        (["report", "runs/a", "--out", "b"], "runs/a is one"),
        (["study", "--plan", "x"], "there is no plan x; use one of ablations"),
        (["study", "--plan", "main", "--only", "x"], "no arm x; the arms are control"),
        (["study", "--plan", "main", "--tables-only", "--measure-only"], "measures nothing"),
        (["study", "--plan", "main", "--tables-only"], "neither results in runs/study/main nor"),
        (["train", "--config", "nowhere"], "no config file nowhere"),
        (["train", "--config", "dfd_ar", "lr=1"], "dfd_ar: lr: Key 'lr' is no section of a config"),
        (["train", "--config", "dfd_ar", "--gpus", "0"], "'0', want a whole number of at least 1"),
        (["clips", "a", "--num", "-3"], "'-3', want a whole number of at least 1"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    """Catches argparse's page of usage, a traceback, and work started before the check."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "useless",
    [
        ["--prompt", "a disc moves"],
        ["--prompts", "a.txt"],
        ["--chunks", "3"],
        ["--image", "a.png"],
        ["--video", "a.mp4"],
        ["--out", "a.mp4"],
        ["--overwrite"],
    ],
)
def test_what_a_page_would_ignore_is_refused(useless, capsys):
    """Catches an option that is accepted and has no effect."""
    assert main(["stream", "--serve", *useless]) == EXIT_USER_ERROR
    assert f"{useless[0]} would have no effect" in capsys.readouterr().err


def test_settings_may_stand_among_options():
    """Catches a parser that takes no second setting after an option."""
    options = parse(["train", "run.seed=1", "--config", "dfd_ar", "run.name=b", "--resume"])
    assert options.overrides == ["run.seed=1", "run.name=b"]
    assert options.resume


def test_a_config_is_found_from_anywhere(tmp_path, monkeypatch):
    """Catches names in configs that only work in the checkout's own folder."""
    monkeypatch.chdir(tmp_path)
    short = load_config("dfd_ar")
    assert short == load_config("dfd_ar.yaml")
    assert load_config("tiny/dmd").run.stage == "dmd"
    assert "MISSING" not in plan(short)
    with pytest.raises(ConfigError, match=r"no config file dfd, .*there are dfd_ar\.yaml"):
        load_config("dfd")


def test_shipped_files_are_found():
    """Catches a wrong idea of where a checkout keeps what comes with the package."""
    assert shipped("configs/dfd_ar.yaml").is_file()
    assert shipped("assets/tiny/student.safetensors").is_file()


def test_parsing_raises_what_the_boundary_knows():
    """Catches argparse ending the process from within Python code that parses a command line."""
    with pytest.raises(UserError, match="see selfforcing-dfd pack --help"):
        parse(["pack"])
