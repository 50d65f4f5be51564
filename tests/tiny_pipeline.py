"""The pipeline of diffusers over a tiny student, with the prompt and size of its tests."""

from __future__ import annotations

from tiny_wan import HEIGHT, RECIPE, WIDTH, tiny_parts, tiny_student

from selfforcing_dfd.models.identity import Recipe
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler

PROMPT = "A red Disc moves left"  # capitals: a rebuilt tokenizer would not fold them
SIZE = {"height": HEIGHT, "width": WIDTH}


def make_pipeline(recipe: Recipe = RECIPE) -> CausalWanPipeline:
    made = CausalWanPipeline(tiny_student(recipe=recipe), *tiny_parts(), export_scheduler(recipe))
    made.set_progress_bar_config(disable=True)
    return made
