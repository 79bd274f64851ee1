"""Small benchmarks in their published layouts, and a tiny random model."""

import csv
from pathlib import Path

import torch

from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.tokenizer import Tokenizer

CHINESE = [
    ("泰山在哪里？", ["山东省", "四川省", "青海省", "北京"], "A"),
    ("长江最后流入____。", ["黄海", "渤海", "东海", "南海"], "C"),
    ("大熊猫的主要食物是", ["草", "竹子", "鱼", "米"], "B"),
    ("下列哪一项是中国的首都？", ["巴黎", "上海", "东京", "北京"], "D"),
    ("海水为什么是咸的？", ["河流带来了盐", "鱼", "月亮", "雪"], "A"),
    ("一年有几个季节？", ["两个", "三个", "四个", "五个"], "C"),
    ("黄河流过几个省？", ["六个", "七个", "八个", "九个"], "D"),
]
EXAMPLES = [
    ("人第一次走上月球是哪一年？", ["1949", "1969", "1979", "1999"], "B"),
    ("法国的首都是哪里？", ["巴黎", "北京", "东海", "泰山"], "A"),
    ("圆周率大约是多少？", ["1.4", "2.7", "3.1", "4.2"], "C"),
]


def write_table(
    path: Path, questions: list[tuple[str, list[str], str]], header: list[str] | None
) -> None:
    """Write a CSV file of questions, numbered if the header has a column for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(header)
        for number, (question, options, answer) in enumerate(questions):
            numbered = [str(number)] if header and len(header) > 6 else []
            writer.writerow([*numbered, question, *options, answer])


def make_ceval(folder: Path) -> Path:
    """Write two subjects in C-Eval's layout."""
    header = ["id", "question", "A", "B", "C", "D", "answer"]
    for subject, questions in (("logic", CHINESE[:4]), ("accountant", CHINESE[4:])):
        write_table(folder / "val" / f"{subject}_val.csv", questions, header)
        write_table(folder / "dev" / f"{subject}_dev.csv", EXAMPLES, header)
    return folder


def make_varied(tokenizer: Tokenizer, context: int = 512, **shape: object) -> Transformer:
    """Create a random model with large weights, so that its choices vary."""
    torch.manual_seed(3)
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": context}
    model = Transformer(ModelConfig(**PRESETS["nano"] | size | shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.mul_(30 if writes else 5)
    return model.eval()
