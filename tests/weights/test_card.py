"""The model card of an export: true numbers, no private paths, valid metadata."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from selfforcing_dfd.models.identity import SELF_FORCING, Recipe
from selfforcing_dfd.weights.card import ModelFacts, model_card, parameter_count, write_model_card


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1_418_996_800, "1.42 billion parameters"),
        (1_580_736, "1.6 million parameters"),
        (9_700, "9,700 parameters"),
    ],
)
def test_small_models_are_counted_in_millions(number, words):
    """Catches a card that speaks of 0.00 billion parameters."""
    assert parameter_count(number) == words


def test_nothing_is_claimed_that_is_not_known():
    """Catches the size of another model in a card whose training size is not known."""
    text = model_card(ModelFacts("x"))
    assert "Trained for" not in text
    assert "Trained for 832 x 480 pixels" in model_card(ModelFacts("x", size=(480, 832)))


def test_the_past_of_training_is_in_the_card():
    """Catches a student with a window whose users stream it with another one."""
    recipe = Recipe((1000.0,), 5.0, 3, 21, sink=3, window=6, first_ladder=(1000.0, 500.0))
    text = model_card(ModelFacts("x", recipe=recipe))
    assert "| window | 6 latent frames of history and current chunk |" in text
    assert "| sink | 3 latent frames |" in text
    assert "| first chunk's ladder before the shift | 1000, 500 |" in text


def test_the_card_shows_the_training_and_no_paths():
    """Catches a summary without the numbers that matter, and somebody's folders in public."""
    config = {
        "run": {"stage": "dfd", "out": "secret-place"},
        "optim": {"student": {"lr": 2e-6}},
        "weights": {"teacher": "secret-place"},
        "dfd": {"p": 0.5},
    }
    text = model_card(
        ModelFacts("x", training=config, measured={"latency, p50": "41 ms"}, limits=("No hands.",))
    )
    for part in (
        "| optim.student.lr | `2e-06` |",
        "| dfd.p | `0.5` |",
        "| latency, p50 | 41 ms |",
        "- No hands.",
    ):
        assert part in text
    assert "secret-place" not in text
    assert "Nothing yet." in model_card(ModelFacts("x"))


def test_names_cannot_break_the_cards_metadata(tmp_path):
    """Catches YAML put together by hand."""
    write_model_card(tmp_path, ModelFacts("x", license='a: "b" #c', tags=("yes", "1.0", "- x")))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == 'a: "b" #c'
    assert data.tags[-3:] == ["yes", "1.0", "- x"]


def test_a_readme_by_hand_stays(tmp_path):
    """Catches an evening's writing that the next export replaces."""
    facts = ModelFacts("x", SELF_FORCING)
    path = write_model_card(tmp_path, facts)
    assert write_model_card(tmp_path, ModelFacts("y")).read_text() == model_card(ModelFacts("y")), (
        "ours is renewed"
    )
    path.write_text("mine")
    assert write_model_card(tmp_path, facts).read_text() == "mine"


def test_a_card_of_image_to_video_begins_with_a_picture():
    """Catches a card whose first call is refused, since a caption alone makes no clip."""
    recipe = dataclasses.replace(SELF_FORCING, given=1)
    text = model_card(ModelFacts("mine", recipe=recipe))
    assert "context=context" in text
    assert "--image first.png" in text
    assert "| given | the first 1 latent frame(s), such as a picture's |" in text
    assert 'pipe("' not in text
    plain = model_card(ModelFacts("mine"))
    assert "given" not in plain
    assert "--image" not in plain
