"""One real report of untrained students, and sample videos."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import av
import imageio.v2 as imageio
import pytest
import torch
from test_page import parsed
from tiny_models import fill_weights, save_network
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config, ConfigError, NetworkConfig
from selfforcing_dfd.evaluation.gate import GateError, check_gate
from selfforcing_dfd.evaluation.pictures import GAP, ROW_GAP
from selfforcing_dfd.evaluation.report import sample_videos, write_report
from selfforcing_dfd.evaluation.showcase import write_showcase
from selfforcing_dfd.evaluation.sources import sources
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.stages import arms_of, load_config
from selfforcing_dfd.stages.config_files import change, to_yaml
from selfforcing_dfd.training.build import build_network
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.weights.run_record import RunError
from selfforcing_dfd.weights.stored import WeightsError
from tests.run_files import finish

SIZES = NetworkConfig(num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, freq_dim=32)


def config_of(folder: Path, *overrides: str) -> Config:
    """A run whose student, teacher and arms exist, untrained.

    The arm `caption` has other weights than the others.
    """
    text = f"""
    run: {{name: demo, stage: dfd, out: {folder}/runs, device: cpu}}
    rollout: {{frames: 6, ladder: [1000, 500]}}
    weights: {{student: {folder}/student.safetensors, teacher: {folder}/teacher.safetensors}}
    data: {{shards: {folder}/none, tiny: {{clips: 8}}}}
    report: {{clips: 8, teacher_steps: 1}}
    arms: {{control: [run.stage=dmd], twin: [dfd.p=0.3], caption: [dfd.pairing=caption]}}
    """
    (folder / "demo.yaml").write_text(text)
    config = load_config(str(folder / "demo.yaml"), overrides)
    arms = folder / "runs" / "demo"
    files = [folder / f"{role}.safetensors" for role in ("student", "teacher")]
    files += [arms / name / "student.safetensors" for name in ("control", "twin", "caption")]
    network = build_network(SIZES)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill_weights(network, seed=1 if "caption" in path.parts[-2] else 0)
        save_network(path, network)
    for arm in arms_of(config):
        (run_folder(arm) / "config.yaml").write_text(to_yaml(arm))
        finish(run_folder(arm), arm.run.student_updates)
    line = {"kind": "student", "student_update": 1, "loss": 0.5, "contrast_ratio": 0.9}
    (arms / "twin" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return config


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A config and the table that its report returned."""
    config = config_of(tmp_path_factory.mktemp("report"))
    return config, write_report(config)


ROWS = ["data", "teacher", "start", "control", "twin", "caption"]


def test_report_has_every_row_in_every_file(reported: tuple[Config, str]):
    """Catches an arm that trains and is left out of what a person reads."""
    config, table = reported
    folder = Path(config.run.out) / "demo"
    saved = json.loads((folder / "report.json").read_text())
    assert [one["name"] for one in saved["rows"]] == ROWS
    assert table.splitlines()[6].split() == ROWS
    assert saved["verdict"] in " ".join(table.split())
    markdown = (folder / "report.md").read_text()
    tags = parsed((folder / "report.html").read_text())
    for name in ROWS:
        assert name in markdown
        assert name in tags.text
        with av.open(str(folder / "samples" / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 21
        assert f"samples/{name}.mp4" in tags.addresses
    assert "samples/side_by_side.mp4" in tags.addresses
    assert saved["config"]["report"]["clips"] == saved["num_clips"] == 8
    assert saved["world"] == "tiny"
    follow = {one["name"]: one["scores"].get("follow") for one in saved["rows"]}
    assert follow["data"]["value"] == 1
    assert follow["teacher"] is None  # it makes all frames at once
    assert follow["control"]["value"] < 1
    assert saved["evaluation_seed"] == 1000
    assert "evaluation seed 1000, on which settings may have been chosen" in " ".join(table.split())
    assert "statement about dose" in saved["background"]
    assert saved["background"] in tags.text


def pictures_of(path: Path) -> list[Tensor]:
    """The video frames of an mp4, [H, W, 3] each."""
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    return [torch.from_numpy(frame).float() for frame in frames]


def test_strip_holds_data_and_arms_in_step(reported: tuple[Config, str]):
    """Catches a strip with another row, another order, or clips of another place or time.

    `twin` is equal to `control`, and `caption` is not. The first clips of a row's own video are
    those of the strip: there 4 lie in a line, here 2.
    """
    samples = Path(reported[0].run.out) / "demo" / "samples"
    strip = pictures_of(samples / "side_by_side.mp4")
    shown = ["data", "control", "twin", "caption"]
    layout = TINY.layout
    side = layout.scale * layout.max_width
    share = 2 * side + GAP + ROW_GAP
    assert len(strip) == 21
    assert strip[0].shape == (3 * side + 2 * GAP, 4 * share - ROW_GAP, 3)
    own = {name: pictures_of(samples / f"{name}.mp4") for name in ROWS}
    for time in (0, 10, 20):
        for place, name in enumerate(shown):
            left = place * share
            clip = strip[time][:side, left : left + side]
            apart = {
                (other, when): float((clip - frames[when][:side, :side]).abs().mean())
                for other, frames in own.items()
                for when in (0, 10, 20)
            }
            nearest = min(apart.values())
            assert apart[name, time] < nearest + 1, (name, time, apart)


def test_every_file_opens_with_the_sentence(reported: tuple[Config, str]):
    """Catches a sentence whose numbers are not those of the rows below it."""
    config, table = reported
    folder = Path(config.run.out) / "demo"
    saved = json.loads((folder / "report.json").read_text())
    counts = {one["name"]: f"{one['scores']['modes']['value']:.0f}" for one in saved["rows"]}
    assert saved["headline"] == (
        f"Real clips show {counts['data']} kinds of motion (colour, direction and speed); for the "
        f"same captions, control (DMD alone) shows {counts['control']}, twin {counts['twin']} and "
        f"caption {counts['caption']} (8 clips each, one run)."
    )
    assert " ".join(table.split()).startswith(saved["headline"])
    assert (folder / "report.md").read_text().split("\n\n")[1] == saved["headline"]
    html = (folder / "report.html").read_text()
    assert html.index("side_by_side.mp4") < html.index(saved["headline"]) < html.index('verdict"')


@pytest.mark.parametrize("name", ["clips.webp", "scores.svg", "scores.png"])
def test_showcase_shows_the_rows_asked_for(reported: tuple[Config, str], tmp_path: Path, name: str):
    """Catches a front page's picture that cannot be made again, or that differs when it is."""
    run = Path(reported[0].run.out) / "demo"
    labels = {"data": "data", "teacher": "T", "start": "DMD", "caption": "DFD caption"}
    for folder in ("one", "two"):
        write_showcase(run, tmp_path / folder / name, labels, ["contrast", "follow"])
    picture = (tmp_path / "one" / name).read_bytes()
    assert picture == (tmp_path / "two" / name).read_bytes()
    if name.endswith(".svg"):
        assert all(label in picture.decode() for label in (*labels.values(), "contrast"))
    if name.endswith(".webp"):
        assert len(imageio.mimread(tmp_path / "one" / name)) == 21


def test_showcase_explains_what_it_cannot_show(reported: tuple[Config, str], tmp_path: Path):
    """Catches a traceback for a misspelt row, metric or ending."""
    run = Path(reported[0].run.out) / "demo"
    with pytest.raises(ConfigError, match="no row 'prefix'; there are data, teacher"):
        write_showcase(run, tmp_path / "x.svg", {"prefix": "DFD"})
    with pytest.raises(ConfigError, match="no metric 'beauty'"):
        write_showcase(run, tmp_path / "x.svg", {"data": "data"}, ["beauty"])
    with pytest.raises(ConfigError, match=r"ends in \.mp4; use one of \.gif"):
        write_showcase(run, tmp_path / "x.mp4", {"data": "data"})
    with pytest.raises(WeightsError, match=r"has no config.yaml"):
        write_showcase(tmp_path, tmp_path / "x.gif", {"data": "data"})


def test_equal_weights_have_equal_rows(reported: tuple[Config, str]):
    """Catches noise or captions that differ between rows: the control would differ from itself."""
    config, _ = reported
    saved = json.loads((Path(config.run.out) / "demo" / "report.json").read_text())
    rows = {one["name"]: one for one in saved["rows"]}
    assert rows["twin"]["scores"] == rows["control"]["scores"]
    assert rows["twin"]["scores"]["contrast"] != rows["caption"]["scores"]["contrast"]
    told = {finding["name"]: finding for finding in saved["findings"]}
    assert told["twin"]["outcome"] == ""
    assert "no verdict about methods" in told["twin"]["text"]


def test_report_can_be_reproduced_from_its_folder(reported: tuple[Config, str]):
    """Catches a saved config that lacks the arms, or that cannot be loaded again."""
    config, _ = reported
    again = load_config(str(Path(config.run.out) / "demo" / "config.yaml"))
    assert again.arms == config.arms
    assert dataclasses.replace(again, base=config.base) == config


def test_missing_arm_is_named_before_anything_is_generated(tmp_path: Path):
    """Catches minutes of sampling that end in an error about the last row."""
    config = config_of(tmp_path)
    (tmp_path / "runs/demo/caption/student.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"caption/student.safetensors; train them first"):
        write_report(config)
    assert not (tmp_path / "runs/demo/samples").exists()


def test_a_report_says_only_what_the_records_prove(tmp_path: Path):
    """Catches a report of settings that trained nothing, and of weights that no training made."""
    config = config_of(tmp_path)
    with pytest.raises(RunError, match=r"control is of another run:\n  optim.student.lr: the run"):
        write_report(change(config, ["optim.student.lr=0.5"]))
    with pytest.raises(RunError, match="control was trained for 40 student updates"):
        write_report(change(config, ["run.student_updates=400"]))
    arms = tmp_path / "runs" / "demo"
    (arms / "control" / "student.safetensors").write_bytes(
        (arms / "caption" / "student.safetensors").read_bytes()
    )
    with pytest.raises(RunError, match=r"control/student\.safetensors is not what the run export"):
        write_report(config)
    (arms / "control" / "run.json").unlink()
    with pytest.raises(RunError, match=r"control has no run\.json, so a report could not say"):
        write_report(config)
    assert not (arms / "samples").exists()


def test_arm_may_not_take_the_name_of_another_row(tmp_path: Path):
    """Catches an arm `data` that would overwrite the reference and be judged against itself."""
    config = dataclasses.replace(config_of(tmp_path), arms={"data": []})
    with pytest.raises(ConfigError, match="an arm is called data"):
        sources(config, TINY)


def test_rows_fit_the_stage(tmp_path: Path):
    """Catches a teacher sampled as a student, and a start row where there is no start."""
    config = dataclasses.replace(config_of(tmp_path), arms={})
    own = tmp_path / "runs" / "demo" / "student.safetensors"
    (tmp_path / "student.safetensors").rename(own)
    start = f"weights.student={own}"
    wanted = {
        "teacher": ["data", "teacher"],
        "init": ["data", "teacher", "student"],
        "dmd": ["data", "teacher", "student"],
        "dfd": ["data", "teacher", "start", "student"],
    }
    for stage, names in wanted.items():
        assert [
            source.name for source in sources(change(config, [f"run.stage={stage}", start]), TINY)
        ] == names
    causal = sources(change(config, ["run.stage=causal", start]), TINY)[-1]
    assert causal.about.endswith("1 ODE steps")  # a causal teacher has no ladder
    assert causal.go_on is not None


def test_sample_writes_a_grid_with_a_line_for_each_prompt(
    reported: tuple[Config, str], tmp_path: Path
):
    """Catches prompts that do not reach the clips beside which their captions are written."""
    run = Path(reported[0].run.out) / "demo"
    path = sample_videos(run, ["a disc moves", "a cross moves"], tmp_path / "two.mp4")
    assert path == tmp_path / "two.mp4"
    captions = path.with_suffix(".txt").read_text().splitlines()
    assert captions == [" | ".join([f"a {shape} moves"] * 4) for shape in ("disc", "cross")]
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height) == (2 * (4 * 64 + 3 * 4), 2 * (2 * 64 + 4))
    assert sample_videos(run).exists()


def test_sample_by_a_small_decoder_says_how_far_it_is(
    reported: tuple[Config, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches clips of a small decoder that pass for the codec's, and options without effect."""
    run = str(Path(reported[0].run.out) / "demo")
    sample = ["sample", "--run", run, "--prompt", "a disc moves", "--out"]
    assert main([*sample, str(tmp_path / "small.mp4"), "--decoder", "small"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"small decoder .*decoder\.safetensors: .*PSNR \d+\.\d dB, flicker", text)
    assert main([*sample, str(tmp_path / "own.mp4"), "--decoder", "tiny"]) == 0
    assert "PSNR" not in capsys.readouterr().out
    assert (tmp_path / "own.mp4").read_bytes() != (tmp_path / "small.mp4").read_bytes()
    assert main([*sample, str(tmp_path / "wan.mp4"), "--decoder", "wan"]) == 2
    assert "--decoder is wan, but these are latents of tiny" in capsys.readouterr().err


def test_sample_explains_what_it_cannot_do(reported: tuple[Config, str], tmp_path: Path):
    """Catches a grid of nonsense for a prompt that no clip of the world could show."""
    run = Path(reported[0].run.out) / "demo"
    with pytest.raises(UserError, match="names nothing of the tiny world"):
        sample_videos(run, ["a horse runs"])
    with pytest.raises(WeightsError, match=r"has no config.yaml"):
        sample_videos(tmp_path)


def test_a_run_outside_of_its_gate_is_refused(reported: tuple[Config, str]) -> None:
    """Catches a start that nothing can be built on, and a gate that lets everything pass.

    Untrained students show nothing valid, so their mean speed is not stated.
    """
    config, _ = reported
    check_gate(config)
    check_gate(change(config, ["report.gate.valid=[0,1]"]))
    with pytest.raises(
        GateError, match=r"control: valid is 0\.\d+, wanted 0\.98 to 1; twin: valid"
    ):
        check_gate(change(config, ["report.gate.valid=[0.98,1]"]))
    with pytest.raises(GateError, match=r"twin: valid is .*, wanted -1 to -0\.5"):
        check_gate(change(config, ["report.gate.valid=[-1,-0.5]"]))
    with pytest.raises(GateError, match=r"names smile, which the report does not have: .*valid"):
        check_gate(change(config, ["report.gate.smile=[0,1]"]))
    with pytest.raises(GateError, match="saturation_drift is not stated"):
        check_gate(change(config, ["report.gate.saturation_drift=[0,1]"]))
