"""Roads: TOML files that name the data and the recipe of each step from a tokenizer to a report."""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from minimind.config.load import leaves, load_settings
from minimind.config.roles import Settings

ROADS = "roads"  # the group of the packaged roads
_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
# Folders beside those of the stages.
OWN_ANSWERS = "own-answers"
_OTHER_FOLDERS = ("tokenizer", "model", "eval", "page", "report-plots", OWN_ANSWERS)


class RoadTokenizer(Settings):
    """The tokenizer that a road trains."""

    data: list[str] = Field(min_length=1, description="Files, folders, globs or dataset names.")
    vocab_size: int = Field(6400, ge=1, description="Vocabulary size, in tokens.")


class RoadStage(Settings):
    """A training stage: a recipe, its data, and settings that differ from the recipe."""

    recipe: str = Field(description="Recipe file, or the name of a packaged recipe.")
    data: list[str] = Field(
        default_factory=list, description="Training data; default: that of the recipe."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the recipe to override."
    )
    own_answers: list[str] = Field(
        default_factory=list,
        description="Conversations, for a stage of preference optimization: their answers are "
        "preferred to those that the model before it gives (`minimind data pairs`).",
    )
    num_own_answers: int = Field(
        2_000,
        ge=1,
        description="Number of these conversations, evenly spaced; needs own_answers.",
    )

    @model_validator(mode="after")
    def _check_own_answers(self) -> "RoadStage":
        if self.model_fields_set & {"own_answers", "num_own_answers"} == {"num_own_answers"}:
            raise ValueError("num_own_answers needs own_answers, the conversations to answer")
        return self


class RoadEvaluation(Settings):
    """The evaluation of the final model."""

    tasks: list[str] = Field(default_factory=list, description="As for `minimind eval --task`.")
    questions: list[str] = Field(
        default_factory=list, description="Questions that the model answers after each stage."
    )


class Road(Settings):
    """All steps of a road. Each stage starts from the model of the stage before."""

    tokenizer: RoadTokenizer
    stages: dict[str, RoadStage] = Field(min_length=1, description="By the name of its folder.")
    evaluation: RoadEvaluation = Field(default_factory=lambda: RoadEvaluation())

    @field_validator("stages")
    @classmethod
    def _check_names(cls, stages: dict[str, RoadStage]) -> dict[str, RoadStage]:
        for name in stages:
            if not _STAGE_NAME.fullmatch(name) or name in _OTHER_FOLDERS:
                raise ValueError(
                    f"{name!r} cannot be the name of a stage: use letters, digits, - and _, and "
                    f"none of {', '.join(_OTHER_FOLDERS)}"
                )
        return stages


def load_road(name: str) -> Road:
    """Load a road file or a packaged road. Raises ConfigError with the file, line and key."""
    return load_settings(Road, name, ROADS)


def training_settings(road: Road) -> dict[str, Any]:
    """Return the settings that determine the trained models, by dotted key."""
    return leaves(road.model_dump(exclude={"evaluation"}))


def repeated_steps(previous: Road, road: Road) -> list[str]:
    """Return the folders of the steps whose results the changes of a road make invalid.

    These are the first step that differs and all later ones, of both roads, up to the evaluation.
    An empty list: both roads train the same models.
    """
    before, now = (
        [("tokenizer", each.tokenizer), *each.stages.items()] for each in (previous, road)
    )
    if before == now:
        return []
    same = 0
    while before[same : same + 1] == now[same : same + 1]:
        same += 1
    changed = [name for name, _ in (*before[same:], *now[same:])]
    return [*dict.fromkeys(changed), "model", "eval"]
