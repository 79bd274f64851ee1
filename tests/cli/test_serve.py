from pathlib import Path

from minimind.inference.engine import Engine
from minimind.inference.load import load_for_inference
from minimind.tokenizer import Tokenizer
from minimind.units import format_memory
from tests.support.services import save_models, serving


def test_serve_prints_url_cache_and_batch_invariance_of_each_model(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = save_models(tmp_path / "models", tokenizer, context=64)
    with serving(models, tmp_path / "log") as service:
        assert service.child.stdout  # `serving` has read the first line
        lines = [service.child.stdout.readline() for _ in range(5)]
    with Engine(*load_for_inference(models / "tiny"), slots=16, context=64) as engine:
        size = format_memory(engine.cache_bytes)
    promise = "an answer does not depend on other requests, to the bit"
    assert lines == [
        f"tiny: {service.url}/v1\n",
        f"other: KV cache of 16 × 64 tokens ({size})\n",
        f"other: {promise}\n",
        f"tiny: KV cache of 16 × 64 tokens ({size})\n",
        f"tiny: {promise}\n",
    ]
