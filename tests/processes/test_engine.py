"""Where work is done, as options say it. What needs Ray is in `test_cluster`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from in_processes import doubled

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.processes.engine import HERE, Engine, in_processes


def test_an_engine_changes_no_result() -> None:
    """Catches results that are lost or change places on the way."""
    wanted = [(2 * number, 1) for number in range(5)]
    assert HERE.is_here
    for engine in (HERE, in_processes(2, "fork")):
        assert list(engine.each_in_order(doubled, range(5))) == wanted
    assert not in_processes(2).is_here
    assert not Engine("ray", 1).is_here


def test_a_cluster_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a traceback on a machine without Ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray: pip install '\.\[ray\]'"):
        list(Engine("ray").each_in_order(doubled, [1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--address", "auto"), "--address is of a Ray cluster; add --engine ray"),
        (("--engine", "ray", "--device", "cuda:1"), "each process of a cluster gets a GPU"),
        (("--engine", "spark"), "invalid choice: 'spark'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an address that nobody calls, and one GPU that all processes of a cluster share."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(b"no video")
    words = ["curate", "embed", str(tmp_path / "films"), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 2)
        assert main(words) == 2
    assert message in capsys.readouterr().err
