from pathlib import Path

from minimind.errors import ConfigError, DataError
from minimind.training.stage import prepare_stage
from tests.support.small_runs import RecordingReporter
from tests.support.stages import MakeRecipe, refused


def test_separate_validation_data_replaces_the_validation_fraction(
    recipe: MakeRecipe, corpus: Path
) -> None:
    own = recipe(data__validation=[str(corpus / "text.jsonl")], data__validation_fraction=0.5)
    trainer = prepare_stage(own, reporter=RecordingReporter()).trainer
    assert trainer.validation_data is not None
    assert trainer.validation_data.order.epoch_size == trainer.data.order.epoch_size


def test_too_little_held_out_text_is_reported(recipe: MakeRecipe) -> None:
    reporter = RecordingReporter()
    trainer = prepare_stage(recipe(data__validation_fraction=0.0), reporter=reporter).trainer
    assert trainer.validation_data is None
    assert any("too little text is held out" in line for line in reporter.lines)


def test_less_than_one_sequence_is_an_error(recipe: MakeRecipe, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "长江很长。"}\n', encoding="utf-8")
    message = refused(recipe(data__sources=[str(short)]), DataError)
    assert message == (
        "the data does not fill one sequence of 32 tokens; use more text, or a smaller data.seq_len"
    )


def test_missing_data_is_an_error(recipe: MakeRecipe, tmp_path: Path) -> None:
    assert "data.sources is empty: give --data FILE" in refused(
        recipe(data__sources=[]), ConfigError
    )
    gone = str(tmp_path / "gone.jsonl")
    assert gone in refused(recipe(out=tmp_path / "other", data__sources=[gone]), DataError)
