"""When prompts start, and what is said about a schedule that cannot be used."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, repeat

import pytest

from selfforcing_dfd.live.prompts import ChunkClock, PromptError, PromptSchedule


def test_schedule_gives_each_prompt_at_its_chunk_only():
    """Catches a prompt that is set again at every chunk, which would clear the past each time."""
    schedule = PromptSchedule.parse(
        "# the story\n0: a disc moves\n\n  4:  a square: it moves  \n", fps=16
    )
    assert schedule.first == "a disc moves"
    assert [schedule.at(i) for i in range(6)] == [
        "a disc moves",
        None,
        None,
        None,
        "a square: it moves",
        None,
    ]


@pytest.mark.parametrize(
    ("seconds", "chunk"),
    [("0.001", 1), ("0.75", 1), ("0.7501", 2), ("1", 2), ("1.75", 2), ("2.75", 3), ("100", 101)],
)
def test_seconds_are_the_first_chunk_from_then_on(seconds, chunk):
    """Catches rounding to the chunk before, and 12 video frames in the first chunk.

    At 12 a second, chunks start at 0, 0.75, 1.75, 2.75 s.
    """
    assert PromptSchedule.parse(f"0s: a\n{seconds}s: b", fps=12).at(chunk) == "b"


@pytest.mark.parametrize("fps", [16, 24000 / 1001])
@pytest.mark.parametrize(
    ("chunk_frames", "after_context"), [(3, False), (3, True), (1, False), (5, False)]
)
def test_seconds_agree_with_counting(fps, chunk_frames, after_context):
    """Catches a formula that is right for the first chunks only.

    It is tried a hundredth of a second around each of thirty starts.
    """
    rate = Fraction(fps).limit_denominator(1001)
    first = 4 * chunk_frames - (0 if after_context else 3)
    starts = [0, *accumulate(repeat(4 * chunk_frames, 30), initial=first)]
    for start in starts[1:-1]:
        for shift in (-0.01, 0.01):
            moment = f"{float(start / rate) + shift:.6f}"
            wanted = next(i for i, other in enumerate(starts) if other / rate >= Fraction(moment))
            schedule = PromptSchedule.parse(
                f"0: a\n{moment}s: b", fps, ChunkClock(chunk_frames, 4, after_context)
            )
            assert schedule.at(wanted) == "b", (start, shift)


def test_seconds_do_not_suffer_from_binary_fractions():
    """Catches float errors: 8.3 * 30 > 249 would be a chunk too late.

    Chunk 21 starts at video frame 249.
    """
    assert PromptSchedule.parse("0: a\n8.3s: b", fps=30).at(21) == "b"


def test_after_a_context_the_first_chunk_is_as_long_as_others():
    """Catches prompts that come three video frames early behind an image."""
    clock = ChunkClock(after_context=True)
    assert PromptSchedule.parse("0: a\n1s: b", fps=12, clock=clock).at(1) == "b"
    assert PromptSchedule.parse("0: a\n1.01s: b", fps=12, clock=clock).at(2) == "b"


def test_other_chunk_lengths():
    """Catches fixed chunks of three and stride 4: with one and 2, chunks start at 0, 1, 3, 5."""
    schedule = PromptSchedule.parse(
        "0: a\n3s: b\n4s: c", fps=1, clock=ChunkClock(chunk_frames=1, stride=2)
    )
    assert schedule.prompts == ((0, "a"), (2, "b"), (3, "c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: there is no prompt"),
        ("# only\n\n", "line 1: there is no prompt"),
        ("a disc moves\na square moves", r"line 1: got 'a disc moves'; write `at: prompt`"),
        ("0: a\n\n1.5: b", r"line 3: got '1.5: b'; write `at: prompt`.*3\.5s"),
        ("0: a\n-1: b", "line 2: got '-1: b'"),
        ("0: a\n2:", "line 2: 2 has no prompt"),
        ("# x\n3: a", "line 2: the first prompt starts at chunk 3; let it start at 0"),
        ("0: a\n5: b\n4: c", "line 3: starts at chunk 4.*chunk 5: out of order"),
        ("0: a\n1.0s: b\n1.1s: c", "line 3: .*the same chunk"),
        ("0: a\n" + "9" * 5000 + ": b", "line 2: got '999"),  # more digits than Python reads
    ],
)
def test_errors_name_the_line_and_the_cure(text, message):
    """Catches a schedule that is silently reordered, shortened or taken for something else."""
    with pytest.raises(PromptError, match=message):
        PromptSchedule.parse(text, fps=16)


def test_files_are_utf8_with_any_line_ends(tmp_path):
    """Catches a byte order mark or a carriage return that becomes part of a prompt."""
    path = tmp_path / "story.txt"
    path.write_bytes("\ufeff0: ein Würfel\r\n1: zwei\r\n".encode())
    assert PromptSchedule.read(path, fps=16).prompts == ((0, "ein Würfel"), (1, "zwei"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"0: \xff", "is not UTF-8"), (b"x", "line 1")],
)
def test_errors_name_the_file(tmp_path, content, message):
    """Catches a stack trace for a misspelt name."""
    path = tmp_path / "story.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=rf"story\.txt.*{message}"):
        PromptSchedule.read(path, fps=16)
