"""Fixtures that many tests share: tokenizers and a small demo."""

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import typer.testing

from minimind.tokenizer import Tokenizer, train_tokenizer
from tests.support.foreign import make_tokenizer
from tests.support.shared import shared_directory

# Objects of imported modules and collected tests stay; to search them for cycles takes seconds.
gc.disable()
# CliRunner would build all commands anew in each call.
typer.testing._get_command = functools.cache(typer.testing._get_command)
# Several threads slow tiny matrices down, above all on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The figures of tests hold with any compiler and without one; tests of compiled decoding enable it.
os.environ.setdefault("MINIMIND_NATIVE", "0")
# pytest-xdist gives its workers a terminal of 80 x 24, which rich would keep to; tests choose one.
for _variable in ("COLUMNS", "LINES"):
    os.environ.pop(_variable, None)
# A shell ignores SIGINT in background jobs, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline per example: how long one takes depends on what else the machine does.
hypothesis.settings.register_profile("minimind", deadline=None)
hypothesis.settings.load_profile("minimind")

TEXTS = [
    "长江是中国最长的河流，全长约六千三百公里。长江发源于青藏高原，最后流入东海。",
    "黄河是中国第二长的河流。黄河流过九个省，最后流入渤海。人们把黄河叫做母亲河。",
    "泰山在山东省，是五岳之首。很多人在夜里上山，等着看日出。泰山的日出很美。",
    "大熊猫生活在中国的山里，主要的食物是竹子。大熊猫一天要吃很多竹子，也很爱睡觉。",
    "海水为什么是咸的？因为河流把石头里的盐带到海里，水变成云飞走了，盐却留在海里。",
    "问：中国的首都是哪里？答：中国的首都是北京。问：法国的首都是哪里？答：法国的首都是巴黎。",
    "你好，我是一个小小的语言模型。我可以回答你的问题，也可以和你聊天。",
    "一年有四个季节：春天、夏天、秋天和冬天。春天花开，夏天很热，秋天叶子黄了，冬天下雪。",
    "1949年10月1日，中华人民共和国成立了。1969年，人第一次走上月球。圆周率大约是3.14159。",
    "The Yangtze is the longest river in China. It is about 6,300 kilometres long.",
    "The river begins on the plateau in the west and ends in the sea in the east.",
    "What is the capital of France? The capital of France is Paris. It's on the Seine.",
    "A giant panda eats bamboo all day long, and then it sleeps. Pandas live in the mountains.",
    "Why is the sea salty? Because rivers carry salt from the rocks into the sea.",
    "I'm a small language model. I'll answer your questions, and we're going to talk.",
    "def double(number):\n    return number * 2\n\nprint(double(21))\n",
    "第一行\n第二行\n\n第三行：苹果、香蕉、梨。\n\n\n最后一行！\n",
]


def _order(path: Path) -> tuple[bool, str]:
    """Return the sort key of a test file: its package, those with long tests first."""
    package = path.relative_to(Path(__file__).parent).parts[0]
    return package not in ("docs", "web", "serving"), package


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without an NVIDIA GPU; keep the tests of each package together.

    They share services, browsers and corpora. Processes of pytest-xdist take tests from the end of
    the queue of another one, so the packages with long tests and expensive fixtures come first.
    pytest-randomly has shuffled the modules, and their order within a package stays random.
    """
    import torch

    items.sort(key=lambda item: _order(item.path))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """From here on, look for cycles among new objects only."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def fixed_threads() -> Iterator[None]:
    """Fix the number of threads, on which exact sums depend; tests/processors.py varies it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("MINIMIND_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch before each test, so that the order of tests does not matter."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of 600 tokens; some span several Chinese characters or line breaks."""
    return train_tokenizer(TEXTS, vocab_size=600)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same tokenizer; read-only."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def foreign_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a foreign tokenizer by the name of its kind; read-only."""
    directories: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in directories:
            directories[name] = make_tokenizer(name, tmp_path_factory.mktemp("foreign"), TEXTS)
        return directories[name]

    return directory


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with `out/demo` after a few steps, and the output of the command; read-only."""
    from tests.support.small_demo import make_small_demo

    def fill(folder: Path) -> None:
        (folder / "output.txt").write_text(make_small_demo(folder), encoding="utf-8")

    folder = shared_directory(tmp_path_factory, "demo", fill)
    return folder, (folder / "output.txt").read_text("utf-8")
