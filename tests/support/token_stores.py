"""Sample data and helpers for the tests of token stores."""

import json
from pathlib import Path

import numpy as np

from minimind.data.store import Split, TokenStore

TEXTS = [f"第{n}段：长江流入东海。The river is {n} miles long." for n in range(1_500)]


CHATS = [[("早", "早上好")], [("你是谁？", "我是模型。"), ("你好吗？", "我很好，谢谢。")]] * 40


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def documents(store: TokenStore, split: Split = "train") -> list[list[int]]:
    """Return the token ids of each document."""
    ids = []
    for shard in store.shards(split):
        assert len(shard.tokens) == (shard.ends[-1] if len(shard.ends) else 0)
        pieces = np.split(np.asarray(shard.tokens), shard.ends[:-1])
        ids += [piece.tolist() for piece in pieces]
    return ids


def names(store_folder: Path) -> list[str]:
    """Return the suffixes of the entries in the folder of the stores."""
    return sorted(path.name.partition(".")[2].partition("-")[0] for path in store_folder.iterdir())
