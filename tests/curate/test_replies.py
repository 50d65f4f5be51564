"""Three captions in one reply, however a model writes its tags, and what is made of the rest."""

from __future__ import annotations

import pytest

from selfforcing_dfd.curate.replies import PROMPT, Parsed, first_sentence, parse, shortened

WANTED = {"short": "A cat sits.", "medium": "A cat sits on a mat. It purrs.", "long": "A grey cat."}
PLAIN = "[SHORT] A cat sits.\n[MEDIUM] A cat sits on a mat. It purrs.\n[LONG] A grey cat."


def captions(reply: str, finished: bool = True) -> dict[str, str]:
    parsed = parse(reply, finished)
    assert parsed is not None
    return dict(parsed.captions)


@pytest.mark.parametrize(
    "reply",
    [
        PLAIN,
        "[LONG] A grey cat.\n\n[SHORT]A cat sits.\n[medium]: A cat sits on a mat.\n It purrs.",
        PLAIN.replace("[", "**[").replace("]", "]**"),
        PLAIN.replace("[", "【").replace("]", "】"),
        "Short: A cat sits.\n**Medium:** A cat sits on a mat. It purrs.\n## LONG: A grey cat.",
        f"<think>[SHORT] no, [LONG] wait</think>\n{PLAIN}",
        f"Sure, here they are:\n{PLAIN}\n[SHORT] again",
        PLAIN.replace(" ", "  ") + "  \n",
    ],
)
def test_tags_are_found_in_every_dress(reply: str) -> None:
    """Catches a parser that knows one model's habits: order, marks, brackets, thoughts."""
    assert parse(reply) == Parsed(WANTED, ())


def test_the_prompt_asks_for_what_is_parsed() -> None:
    """Catches a prompt whose tags the parser does not know, and the order in which LONG is cut."""
    places = [PROMPT.index(tag) for tag in ("[SHORT]", "[MEDIUM]", "[LONG]")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("reply", "made_up", "short"),
    [
        ("[MEDIUM] One. Two.\n[LONG] Three. Four.", ("short",), "One."),
        ("[LONG] Three. Four.", ("short", "medium"), "Three."),
        ("[SHORT] One.", ("medium", "long"), "One."),
        ("A cat sits. It purrs.", ("short", "medium"), "A cat sits."),
        ("[SHORT]\n[MEDIUM] Two. More.", ("short", "long"), "Two."),
    ],
)
def test_what_is_missing_is_made_of_the_rest(
    reply: str, made_up: tuple[str, ...], short: str
) -> None:
    """Catches a clip without a caption of one level, and one that nobody knows was made up."""
    parsed = parse(reply)
    assert parsed is not None and parsed.made_up == made_up
    assert parsed.captions["short"] == short
    assert all(parsed.captions.values())
    assert parse(reply) == parsed


@pytest.mark.parametrize("reply", ["", " \n", "<think>hm", "[SHORT] [MEDIUM]", "**"])
def test_a_reply_without_text_is_no_caption(reply: str) -> None:
    """Catches an empty caption in a table."""
    assert parse(reply) is None


def test_a_reply_that_was_cut_off_ends_with_a_sentence() -> None:
    """Catches half a sentence at the token limit, and that it goes unsaid."""
    parsed = parse(f"{PLAIN} It looks at the", finished=False)
    assert parsed is not None
    assert parsed.captions == WANTED
    assert parsed.made_up == ("long",)
    assert captions("[LONG] a cat that looks at the", finished=False)["long"].endswith("at the")


def test_lengths_keep_whole_sentences() -> None:
    """Catches a caption that breaks off amid a sentence, and one without limit."""
    text = " ".join(f"Sentence number {n} has six words." for n in range(50))
    assert shortened(text, 180) == " ".join(text.split()[:180])
    assert shortened(text, 181).split() == text.split()[:180]
    assert len(shortened("word " * 300, 180).split()) == 180
    assert first_sentence("It is 3.5 m long! Look.") == "It is 3.5 m long!"
    assert len(first_sentence("word " * 300).split()) == 40
    assert first_sentence("一只猫坐着。它在叫。") == "一只猫坐着。"


def test_a_word_in_a_sentence_is_no_tag() -> None:
    """Catches `a (short) man` or `long` at the beginning of a line taken for a tag."""
    reply = "[SHORT] A (short) man.\n[MEDIUM] A man\nlong before noon.\n[LONG] A short man: tall."
    assert captions(reply) == {
        "short": "A (short) man.",
        "medium": "A man long before noon.",
        "long": "A short man: tall.",
    }
