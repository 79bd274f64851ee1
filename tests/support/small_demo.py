"""`minimind demo` in a few steps on little text: every stage for real, in seconds."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minimind.cli import demo as verb
from minimind.cli.main import app

FEW = {
    "training": {"steps": 4, "global_batch_size": 4, "log_every": 2},
    "validation": {"every": 2, "num_sequences": 4},
    "checkpoint": {"every": 2},
}
LITTLE = {
    "prose_characters": 60_000,
    "held_out_characters": 3_000,
    "single_turn": 400,
    "multi_turn": 100,
    "preference_pairs": 80,
    "multiple_choice_questions": 20,
}


def make_small_demo(folder: Path) -> str:
    """Make `out/demo` in `folder` and return what the command printed."""
    whole = verb._recipe

    def short(*arguments: Any) -> Any:
        recipe = whole(*arguments)
        parts = {name: getattr(recipe, name).model_copy(update=few) for name, few in FEW.items()}
        return recipe.model_copy(update=parts)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(verb, "_recipe", short)
        patch.setattr(verb, "_CORPUS", LITTLE)
        patch.setattr(verb, "_VOCAB_SIZE", 500)
        patch.setattr(verb, "_QUIZ_QUESTIONS", 8)
        patch.setattr(verb, "_ANSWER_TOKENS", 8)
        done = CliRunner().invoke(app, ["demo", "--model", "nano"])
    assert done.exit_code == 0, done.output
    return done.output
