"""The boundary around every command: exit code and message for each kind of error."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import run_script
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfforcing_dfd.cli.errors import (
    EXIT_FAULT,
    EXIT_READER_GONE,
    EXTRAS,
    REPORT,
    TRACEBACK_VARIABLE,
    guarded,
)
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Interrupted,
    UserError,
    find_device,
)
from selfforcing_dfd.flow import few_step_ladder


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C as before, and no wish for tracebacks from the environment."""
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def end_of(error: BaseException, **options: object) -> int:
    """The exit code of a command that raises `error`."""

    def command(_: argparse.Namespace) -> None:
        raise error

    return guarded(argparse.Namespace(command=command, **{"traceback": False, **options}))


def os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("weights are missing; train first"), "weights are missing; train first"),
        (os_error(errno.ENOENT, "a.yaml"), "a.yaml: no such file or folder"),
        (os_error(errno.EACCES, "runs"), "runs: permission denied; choose another place"),
        (os_error(errno.EROFS, "runs"), "runs: read-only file system; choose another place"),
        (os_error(errno.ENOSPC, "runs/a"), "runs/a: the disk is full"),
        (os_error(errno.ENOSPC), "the disk is full"),
        (os_error(errno.EINVAL, "w.pt"), "w.pt: invalid argument"),
        (OSError("the server has no such file\nmore"), "the server has no such file"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory: CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModuleNotFoundError("no", name="uvicorn"), "pip install 'selfforcing_dfd[serve]'"),
        (ModuleNotFoundError("no", name="wandb.sdk"), "pip install 'selfforcing_dfd[track]'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, message, capsys):
    """Catches a traceback for an everyday mistake, and a message without the path."""
    assert end_of(error) == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_a_value_that_our_own_code_refuses_is_explained(capsys):
    """Catches a traceback for a mistake that the core finds: it raises plain ValueErrors."""
    with pytest.raises(ValueError, match="ladder") as refused:
        few_step_ladder((3.0, 5.0), 5.0)
    assert type(refused.value) is ValueError
    assert end_of(refused.value) == EXIT_USER_ERROR
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("of a library"), KeyError("a"), ImportError("b")])
def test_a_fault_shows_its_traceback(error, capsys):
    """Catches a bug of ours that ends in a meaningless line, with nothing to report."""
    assert end_of(error) == EXIT_FAULT
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "in command" in printed
    assert printed.endswith(f"{REPORT}\n")


@pytest.mark.parametrize("way", ["option", "variable", "off"])
def test_a_traceback_on_request(way, monkeypatch, capsys):
    """Catches errors that can never be traced to their place."""
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1" if way == "variable" else "0")
    assert end_of(UserError("no"), traceback=way == "option") == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) is (way != "off")
    assert printed.endswith("error: no\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {name: a}\n\tx: 1\n", "a.yaml, line 2, column 1: not YAML"),
        ("run: {name: [\n", "a.yaml, line"),
        ("run: !!python/object/apply:os.system ['true']\n", "a.yaml, line 1, column 6: not YAML"),
        (f"a: {'[' * 3000}{']' * 3000}", "nested too deeply"),
    ],
)
def test_a_file_that_is_not_yaml(content, message, tmp_path, capsys):
    """Catches a parser's traceback for a tab, an open bracket or a hostile tag in a config."""
    path = tmp_path / "a.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path), "--dry-run"]) == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_an_error_of_omegaconf(capsys):
    """Catches settings that fail outside of our own reader, with a page of OmegaConf's words."""
    with pytest.raises(OmegaConfBaseException) as refused:
        OmegaConf.to_container(OmegaConf.create({"a": "${missing}"}), resolve=True)
    assert end_of(refused.value) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: Interpolation key 'missing' not found\n"


def test_a_run_that_saved_itself(capsys):
    """Catches a stop on request that is reported as a failure."""
    assert end_of(Interrupted("saved at update 3; --resume goes on")) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "saved at update 3; --resume goes on\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "interrupted\n"), ({"resume": False}, "interrupted; the same command with --resume")],
)
def test_ctrl_c(options, message, capsys):
    """Catches a traceback as goodbye, and a command that could be resumed and does not say it."""
    assert end_of(KeyboardInterrupt(), **options) == EXIT_INTERRUPTED
    assert capsys.readouterr().err.startswith(message)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    """Catches a traceback of a thread that Python waits for at its end."""
    program = """
        import argparse, signal, sys, threading, time
        from selfforcing_dfd.cli.errors import guarded

        # a shell's background jobs ignore Ctrl-C, and so do their children
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def command(options):
            threading.Thread(target=time.sleep, args=(60,)).start()
            print("started", flush=True)
            time.sleep(60)

        sys.exit(guarded(argparse.Namespace(command=command, traceback=False)))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "interrupted\n"
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == EXIT_INTERRUPTED
    assert time.monotonic() - asked < 10
    assert process.stderr.read() == ""


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    """Catches `selfforcing-dfd benchmark | head`, which ended in a traceback."""
    program = """
        import argparse, sys
        from selfforcing_dfd.cli.errors import guarded

        def command(options):
            for _ in range(100_000):
                print("a line of a long table")

        sys.exit(guarded(argparse.Namespace(command=command, traceback=False)))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == EXIT_READER_GONE
    assert process.stderr.read() == b""


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["benchmark", "--help"]], ids=str)
def test_help_for_a_reader_that_has_left_is_no_error(words):
    """Catches `selfforcing-dfd | head -1` and `--help | true`, which ended in tracebacks."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "selfforcing_dfd", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    # argparse itself ignores a help text that nobody reads
    assert done.returncode in (0, EXIT_READER_GONE)


def test_another_broken_pipe_is_an_error(capsys):
    """Catches an encoder that died, taken for a reader who has seen enough."""
    assert end_of(os_error(errno.EPIPE)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: broken pipe\n"


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_every_extra_exists(package):
    """Catches advice to install an extra that pyproject.toml does not have."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert f"\n{EXTRAS[package]} = [" in extras


def test_a_command_without_its_extra_names_it(tmp_path: Path):
    """Catches `stream --serve` that ends in a traceback where no web server is installed."""
    program = """
        import sys

        for name in [name for name in sys.modules if name.startswith("selfforcing_dfd")]:
            del sys.modules[name]  # what another test has imported
        sys.modules["uvicorn"] = None
        from selfforcing_dfd.cli.main import main

        sys.exit(main(["stream", "--serve"]))
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    end = run_script(tmp_path, str(path))
    assert end.code == EXIT_USER_ERROR
    assert "pip install 'selfforcing_dfd[serve]'" in end.errors
    assert "Traceback" not in end.errors


def test_errors_name_the_option_that_was_typed(capsys):
    """Catches an error about a setting that the user has never heard of."""
    with pytest.raises(UserError) as refused:
        find_device("gpu")
    assert end_of(refused.value, device="gpu") == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: --device is 'gpu'; use auto")
    assert end_of(refused.value) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: device is 'gpu'; use auto")


def test_importing_the_boundary_is_cheap():
    """Catches a heavy import that slows down every --help: only the standard library is allowed."""
    program = "import sys; before = set(sys.modules); import selfforcing_dfd.cli.errors\n"
    program += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"selfforcing_dfd"}
    assert foreign == set()
