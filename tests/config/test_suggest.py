import pytest

from minimind.config.load import setting_descriptions
from minimind.config.suggest import similar_settings


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("optim.lrr", ["optim.lr"]),
        ("optim.lr.x", ["optim.lr"]),
        ("optim.learningrate", ["optim.lr"]),
        ("training.learning_rate", ["optim.lr"]),
        ("lr", ["optim.lr"]),
        ("training.lr", ["optim.lr"]),
        ("sed", ["seed"]),
        ("optmi", ["optim"]),
        ("batch_size", ["training.global_batch_size", "training.micro_batch_size"]),
        ("data.batch_size", ["training.global_batch_size", "training.micro_batch_size"]),
        ("max_steps", ["training.steps"]),
        ("every", ["validation.every", "checkpoint.every"]),
        ("validaton.every", ["validation.every"]),
        ("gradient_accumulation", ["training.micro_batch_size"]),
        ("model.num_layers", ["model.num_hidden_layers"]),
        ("zzz", []),
        ("optim.zzz", []),
    ],
)
def test_the_last_part_of_a_key_counts_first(key: str, suggested: list[str]) -> None:
    assert similar_settings(key, setting_descriptions()) == suggested
