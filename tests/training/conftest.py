import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# small_runs.py is a module because golden figures are written, and children run, without pytest.
sys.path.insert(0, str(Path(__file__).parent))

from small_runs import Lives


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl (400 short texts), chat.jsonl and pairs.jsonl (200 each)."""
    folder = tmp_path_factory.mktemp("corpus")
    rivers, places = ("长江", "黄河", "珠江", "淮河", "汉江"), ("东海", "渤海", "南海", "洪泽湖")
    texts, chats, pairs = [], [], []
    for number in range(200):
        river, place = rivers[number % 5], places[number % 4]
        texts.append(f"{river}很长，第{number}段长{number * 7}公里。{river}最后流入{place}。")
        texts.append(f"Part {number} of the river is {number * 3} kilometres long.")
        turns = [("user", f"{river}的第{number}段有多长？"), ("assistant", f"{number * 7}公里。")]
        if number % 3 == 0:
            turns += [("user", "它流到哪里？"), ("assistant", f"流入{place}。")]
        chats.append([{"role": role, "content": content} for role, content in turns])
        asked, wrong = turns[0][1], ("不知道。", f"{number * 9}米。{place}。")[number % 2]
        pairs.append({"prompt": asked, "chosen": turns[1][1], "rejected": wrong})
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"conversations": chat}) + "\n" for chat in chats)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return folder


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Starts processes that may be killed; driver.py has what they can do."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    with contextlib.closing(Lives(tmp_path_factory.mktemp("lives") / "output")) as lives:
        yield lives
