from pathlib import Path

from minimind.tokenizer import Tokenizer
from tests.support.services import save_models, serving


def test_it_says_where_each_model_is_and_what_is_promised(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", tokenizer, context=64)
    with serving(models, tmp_path / "log") as service:
        assert service.child.stdout  # of which the first line was read: where `other` is
        lines = [service.child.stdout.readline() for _ in range(3)]
    promise = "an answer does not depend on other requests, to the bit"
    assert lines == [
        f"tiny: {service.url}/v1\n",
        f"other: {promise}\n",
        f"tiny: {promise}\n",
    ]
