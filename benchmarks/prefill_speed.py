"""Prefill and decode speed of the engine, to compare two checkouts alternately.

    python benchmarks/prefill_speed.py TOKENIZER [--threads 2] [--preset small]

Prints the medians of three repetitions: prompt tokens per second over 8 prompts of 512 tokens, and
generated tokens per second with 1 and with 16 streams. Random weights in bfloat16.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from minimind.inference.engine import Engine
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.tokenizer import Tokenizer


def main() -> None:
    """Measure and print a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="small")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(args.tokenizer)
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    model = Transformer(ModelConfig(**PRESETS[args.preset] | shape)).to(torch.bfloat16).eval()
    rng = random.Random(0)
    with Engine(model, tokenizer, slots=16) as engine:

        def seconds(streams: int, prompt: int, new: int) -> float:
            requests = [
                Request(
                    [rng.randrange(10, tokenizer.vocab_size) for _ in range(prompt)],
                    Sampling(temperature=0),
                    new,
                )
                for _ in range(streams)
            ]
            started = time.perf_counter()
            for completion in [engine.submit(request) for request in requests]:
                for _ in completion:
                    pass
            return time.perf_counter() - started

        seconds(16, 100, 4)
        rates = {
            "prefill": [8 * 512 / seconds(8, 512, 1) for _ in range(3)],
            "one_stream": [96 / seconds(1, 8, 96) for _ in range(3)],
            "sixteen_streams": [16 * 64 / seconds(16, 8, 64) for _ in range(3)],
        }
    print(json.dumps({name: round(statistics.median(values), 1) for name, values in rates.items()}))


if __name__ == "__main__":
    main()
