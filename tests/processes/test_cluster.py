"""Work on a Ray cluster: in order, as on this machine, and with an end to everything.

With `make ray-test`, where the package ray is installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from in_processes import doubled

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.processes.engine import Engine
from selfforcing_dfd.tiny.world import write_clips

ROOT = Path(__file__).parents[2]
FRAMES = ("--frames", "9")

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def found_by_workers() -> Iterator[None]:
    """Processes of a cluster import these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'processes'}")
        patch.setenv("RAY_worker_niceness", "0")  # a busy machine would leave it next to nothing
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of this machine: two nodes with a core each, and a head that does no work."""
    from ray.cluster_utils import Cluster

    store = 100 << 20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=store)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips and a file that is no video."""
    folder = tmp_path_factory.mktemp("cluster") / "clips"
    write_clips(folder, 6, 0, "all", 9)
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


def run(*words: object) -> None:
    assert main(list(map(str, words))) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def who(number: int) -> tuple[int, str]:
    """The node of this process."""
    import ray

    time.sleep(0.3)
    return number, ray.get_runtime_context().get_node_id()


def refused(number: int) -> int:
    raise ClipError(str(number), "is not wanted")


def killed_once(number: int, place: Path) -> int:
    if number == 3 and not (place / "seen").exists():
        (place / "seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def killed_always(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_both_nodes_work_and_results_come_in_order(address: str) -> None:
    """Catches work that stays on one machine, and results in the order in which they end."""
    found = list(Engine("ray", None, address).each_in_order(who, range(12)))
    assert [number for number, _ in found] == list(range(12))
    assert len({node for _, node in found}) == 2
    twice = list(Engine("ray", 2, address).each_in_order(doubled, range(9)))
    assert twice == [(2 * number, 1) for number in range(9)]


def test_errors_are_those_of_the_function(address: str) -> None:
    """Catches a refused clip that ends in a page of Ray's, and one that has no words for it."""
    with pytest.raises(ClipError, match="is not wanted") as raised:
        list(Engine("ray", 1, address).each_in_order(refused, range(3)))
    assert "in refused" in "".join(raised.value.__notes__)


def test_a_process_that_dies_is_replaced(address: str, tmp_path: Path) -> None:
    """Catches a cluster that loses an input with a machine, and one that tries for ever."""
    make = partial(killed_once, place=tmp_path)
    assert list(Engine("ray", 1, address).each_in_order(make, range(6))) == list(range(6))
    assert (tmp_path / "seen").exists()
    with pytest.raises(UserError, match=r"the cluster could not do the work: .*died"):
        list(Engine("ray", 1, address).each_in_order(killed_always, range(6)))


def test_captions_vectors_and_shards_are_those_of_one_process(
    address: str, clips: Path, tmp_path: Path
) -> None:
    """Catches results that depend on where they were made."""
    made = {}
    places = {"here": ("--engine", "local"), "there": ("--engine", "ray", "--address", address)}
    for name, engine in places.items():
        table = tmp_path / name / "captions.jsonl"
        caption = ("curate", "caption", clips, "--model", "tiny", *FRAMES, "--workers", 1)
        run(*caption, "--out", table, *engine)
        folder = tmp_path / name / "curation"
        run("curate", "embed", clips, *FRAMES, "--out", folder, *engine)
        vectors = contents(folder)
        run("curate", "cluster", folder, "--clusters", 2)
        run("curate", "pick", folder, "--candidates", 3, "--auto", 2, *engine)
        pack = ("--codec", "tiny", "--captions", table)
        run("curate", "pack", folder, *pack, "--out", tmp_path / name / "set", *engine)
        every = tmp_path / name / "all"
        run("pack", clips, *pack, *FRAMES, "--out", every, *engine)
        files = [contents(tmp_path / name / part) for part in ("set", "all", "curation/sheets")]
        made[name] = [table.read_bytes(), vectors, *files]
    assert made["here"] == made["there"]
    index = json.loads((tmp_path / "there" / "all" / "index.json").read_text())
    assert [one["file"] for one in index["refused"]] == ["bad.mp4"]


def test_a_cluster_of_its_own_listens_here_and_ends(tmp_path: Path) -> None:
    """Catches a door to the network, and processes that stay after the work is done."""
    code = (
        "import sys; from test_cluster import doors; from selfforcing_dfd.processes.engine import "
        "Engine; print(list(Engine('ray', 2).each_in_order(doors, [0, 1])))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[[], []]", ended.stderr
    assert not left_over()


def doors(number: int) -> list[str]:
    """Addresses that processes of Ray listen on, and that others than this machine can reach."""
    ours = [process.pid for process in psutil.process_iter() if is_of_session(process)]
    found = [one for one in psutil.net_connections("tcp") if one.pid in ours]
    heard = [str(one.laddr.ip) for one in found if one.status == "LISTEN"]
    assert heard
    return [ip for ip in heard if not ip.removeprefix("::ffff:").startswith("127.")]


def is_of_session(process: psutil.Process) -> bool:
    """Whether a process belongs to the same cluster as this one."""
    parents = psutil.Process().parents()
    raylet = next(one for one in parents if "raylet" in one.name())
    return raylet in (process, *process.parents())


def left_over() -> list[str]:
    """Processes of a cluster of its own, which ends within seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        mine = psutil.Process().children(recursive=True)
        names = [one.name() for one in psutil.process_iter() if one not in mine]
        found = [name for name in names if name.startswith(("ray::Worker", "raylet"))]
        if not found:
            return []
        time.sleep(0.2)
    return found


def test_a_killed_run_goes_on_and_leaves_nothing_behind(clips: Path, tmp_path: Path) -> None:
    """Catches captions that are bought twice after kill -9, and a cluster without a master."""
    asked: list[Any] = []
    http = slow_server(asked)
    url = f"http://127.0.0.1:{http.server_port}/v1"
    caption = ["curate", "caption", str(clips), "--url", url, "--model", "vlm", *FRAMES]
    caption += ["--workers", "1"]
    out = tmp_path / "captions.jsonl"
    partial_file = tmp_path / "captions.jsonl.partial"
    words = [*caption, "--engine", "ray", "--processes", "2", "--out", str(out)]
    driver = subprocess.Popen([sys.executable, "-m", "selfforcing_dfd", *words])
    deadline = time.monotonic() + 120
    while len(lines_of(partial_file)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    done = len(lines_of(partial_file)) - 1
    assert 3 <= done < 6
    assert not out.exists()
    assert not left_over()
    asked.clear()
    run(*caption, "--processes", 2, "--out", out)
    assert len(asked) <= 6 - done
    run(*caption, "--out", tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    http.shutdown()
    http.server_close()


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def slow_server(asked: list[Any]) -> ThreadingHTTPServer:
    """Answers with a caption that depends on the request's seed alone, after a while."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            time.sleep(0.5)
            text = "[SHORT] {0}.\n[MEDIUM] It is {0}.\n[LONG] This is {0}.".format(body["seed"])
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    return http


def test_a_cluster_that_is_not_there_is_named() -> None:
    """Catches a traceback, and a cluster of its own where another one was meant."""
    with pytest.raises(UserError, match=r"cannot use the Ray cluster at 127\.0\.0\.1:9"):
        list(Engine("ray", 1, "127.0.0.1:9").each_in_order(doubled, [1]))
