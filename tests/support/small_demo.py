"""A `minimind demo` of a few steps on a small corpus: every stage runs, within seconds."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minimind.cli import demo, demo_results
from minimind.cli.main import app

FEW_STEPS = {
    "training": {"steps": 4, "global_batch_size": 4, "log_every": 2},
    "validation": {"every": 2, "num_sequences": 4},
    "checkpoint": {"every": 2},
}
SMALL_CORPUS = {
    "prose_characters": 60_000,
    "held_out_characters": 3_000,
    "single_turn": 400,
    "multi_turn": 100,
    "preference_pairs": 80,
    "multiple_choice_questions": 20,
}


def make_small_demo(folder: Path) -> str:
    """Run the demo in `folder`, writing `out/demo`; return its output."""
    full_recipe = demo._recipe

    def short(*arguments: Any) -> Any:
        recipe = full_recipe(*arguments)
        tables = {
            name: getattr(recipe, name).model_copy(update=table)
            for name, table in FEW_STEPS.items()
        }
        return recipe.model_copy(update=tables)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(demo, "_recipe", short)
        patch.setattr(demo, "_CORPUS", SMALL_CORPUS)
        patch.setattr(demo, "_VOCAB_SIZE", 500)
        patch.setattr(demo_results, "_QUIZ_QUESTIONS", 8)
        patch.setattr(demo_results, "_MAX_ANSWER_TOKENS", 8)
        done = CliRunner().invoke(app, ["demo", "--model", "nano"])
    if done.exit_code != 0:
        raise AssertionError(done.output) from done.exception
    return done.output
