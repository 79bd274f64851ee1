"""Bytes per token of our tokenizer at several vocabulary sizes, and of published tokenizers.

    pip install --no-deps tiktoken sentencepiece llama-models mistral-common dashscope
    python -m benchmarks.tokenizer_compression TOKENIZER --text zh=FILE --text en=FILE [--json FILE]

TOKENIZER is one with a large vocabulary. BPE chooses merges one after the other, so its first
merges are those of a smaller vocabulary. The published tokenizers are files within packages of
PyPI, which are read without importing the packages.
"""

import argparse
import base64
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_texts
from minimind.tokenizer import SPECIAL_TOKENS
from minimind.tokenizer.bpe import load_bpe
from minimind.tokenizer.stats import SAMPLE_TEXTS

SIZES = (300, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200)
# Name: package, file within it, kind of file.
PUBLISHED = {
    "Qwen, Qwen2": ("dashscope", "resources/qwen.tiktoken", "qwen"),
    "Llama 3": ("llama_models", "llama3/tokenizer.model", "llama3"),
    "Mistral 7B v0.3": ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3", "spm"),
    "Mistral NeMo (Tekken)": ("mistral_common", "data/tekken_240911.json", "tekken"),
}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _LLAMA3_PATTERN.replace("{1,3}", "")
Count = Callable[[str], int]  # number of tokens of a text


def main() -> None:
    """Count the tokens of each text with each tokenizer, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    texts = {"built-in Chinese": [SAMPLE_TEXTS[0]], "built-in English": [SAMPLE_TEXTS[1]]}
    for name, _, file in (text.partition("=") for text in args.text):
        texts[name] = list(read_texts([Path(file)], invalid=InvalidRecords()))
    counters = {f"minimind {size}": ours(args.tokenizer, size) for size in SIZES}
    counters |= {name: published(*where) for name, where in PUBLISHED.items()}
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "packages": {p: importlib.metadata.version(p) for p, _, _ in PUBLISHED.values()},
        "texts": {
            name: {"bytes": sum(len(t.encode()) for t in some), "characters": sum(map(len, some))}
            for name, some in texts.items()
        },
        "tokens": {
            name: {text: sum(map(count, some)) for text, some in texts.items()}
            for name, (_, count) in counters.items()
        },
        "vocab_size": {name: size for name, (size, _) in counters.items()},
    }
    for name, tokens in record["tokens"].items():
        ratios = [f"{record['texts'][text]['bytes'] / n:6.2f}" for text, n in tokens.items()]
        print(f"{name:24} {record['vocab_size'][name]:8,} {' '.join(ratios)}")
    if args.json:
        args.json.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")


def ours(directory: Path, size: int) -> tuple[int, Count]:
    """Return the vocabulary size and the counter of a tokenizer that is cut to `size` tokens."""
    bpe = load_bpe(directory)
    state = json.loads(bpe.to_str())
    merges = state["model"]["merges"][: size - 256 - len(SPECIAL_TOKENS)]
    kept = {"".join(pair) for pair in merges}
    merged = {"".join(pair) for pair in state["model"]["merges"]}
    vocab = [t for t in state["model"]["vocab"] if t in kept or t not in merged]
    vocab.sort(key=state["model"]["vocab"].__getitem__)
    state["model"] |= {"merges": merges, "vocab": {token: i for i, token in enumerate(vocab)}}
    small = type(bpe).from_str(json.dumps(state))
    return small.get_vocab_size(), lambda text: len(small.encode(text, add_special_tokens=False))


def published(package: str, file: str, kind: str) -> tuple[int, Count]:
    """Return the vocabulary size without control tokens, and the counter of a published one."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    path = Path(spec.submodule_search_locations[0]) / file
    if kind == "spm":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return model.vocab_size(), lambda text: len(model.encode(text))
    import tiktoken

    if kind == "tekken":
        content = json.loads(path.read_text("utf-8"))
        kept = content["config"]["default_vocab_size"] - content["config"][
            "default_num_special_tokens"
        ]  # fmt: skip
        pattern = content["config"]["pattern"]
        ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in content["vocab"][:kept]}
    else:
        pattern = _QWEN_PATTERN if kind == "qwen" else _LLAMA3_PATTERN
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return len(ranks), lambda text: len(encoding.encode_ordinary(text))


if __name__ == "__main__":
    main()
