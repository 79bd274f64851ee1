import subprocess
import sys
from pathlib import Path

import pytest

from minimind.errors import TokenizerError
from minimind.tokenizer import Tokenizer, train_tokenizer
from minimind.tokenizer.format import ROLES
from minimind.tokenizer.train import sample_uniformly
from tests.support.commands import fast_python

# 10 GB of Chinese text in distinct documents of 12 kB, in a new process.
_TRAIN_ON_10_GB = """
import random, re
from minimind.tokenizer import train_tokenizer
rng = random.Random(0)
text = "".join("，" if rng.random() < 0.1 else chr(rng.randrange(0x4E00, 0xA000))
               for _ in range(5_000_000))
starts = (rng.randrange(len(text) - 4000) for _ in range(10**10 // 12_000))
tokenizer = train_tokenizer(text[start : start + 4000] for start in starts)
peak_kib = re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1)
print(tokenizer.vocab_size, int(peak_kib) * 1024)
"""


def test_the_same_texts_give_the_same_tokenizer_in_another_process(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    conftest = Path(__file__).parents[1] / "conftest.py"
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('conftest', {str(conftest)!r})\n"
        "conftest = importlib.util.module_from_spec(spec); spec.loader.exec_module(conftest)\n"
        "from minimind.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(conftest.TEXTS, vocab_size=600).sha256)\n"
    )
    process = subprocess.run(
        [*fast_python(), "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert process.stdout.strip() == tokenizer.sha256


def test_merges_are_ordered_by_frequency() -> None:
    tokenizer = train_tokenizer(["的的 一一一 的的 的的"], vocab_size=16 + 256 + 2)
    assert tokenizer.decode([16 + 256 + 1]) == "的"


def test_a_vocabulary_that_is_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="need 272"):
        train_tokenizer(["text"], vocab_size=271)
    assert train_tokenizer(["text"], vocab_size=272).vocab_size == 272


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(texts)


def test_little_text_gives_fewer_tokens() -> None:
    tokenizer = train_tokenizer(["ab ab"], vocab_size=6400)
    assert tokenizer.vocab_size == 16 + 256 + 2  # "ab" and " ab"


def test_control_tokens_in_the_text_are_encoded_as_text() -> None:
    tokenizer = train_tokenizer(["<|im_start|>user\n<think>好</think><|im_end|>"] * 50)
    ids = tokenizer.encode("<|im_start|>user\n<think>好</think><|im_end|>")
    assert not tokenizer.special_ids.intersection(ids)


def test_unpaired_surrogates_in_the_text(tmp_path: Path) -> None:
    train_tokenizer(["好\ud83d好好"], vocab_size=280).save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size <= 280


def test_a_small_stream_is_sampled_completely() -> None:
    texts = ["一", "two", "三"]
    assert sample_uniformly(iter(texts), 100) == texts


def test_a_sample_is_bounded_uniform_and_in_order() -> None:
    sample = sample_uniformly((f"{i:08d}" for i in range(100_000)), 8_000)
    numbers = [int(text) for text in sample]
    assert 990 <= len(numbers) <= 1000
    assert numbers == sorted(numbers)
    tenths = [sum(number // 10_000 == tenth for number in numbers) for tenth in range(10)]
    assert max(tenths) - min(tenths) <= 2
    last_digits = [sum(number % 10 == digit for number in numbers) for digit in range(10)]
    assert max(last_digits) - min(last_digits) <= 10


def test_one_long_document_does_not_fill_the_sample() -> None:
    texts = ["short " * 20] * 1000 + ["long " * 1_000_000] + ["short " * 20] * 1000
    sample = sample_uniformly(texts, 200_000)
    assert sum(map(len, sample)) <= 200_000
    assert sum(text.startswith("short") for text in sample) > 50
    assert any("long" in text for text in sample)


def test_the_sample_size_is_in_bytes() -> None:
    sample = sample_uniformly(["好" * 1000] * 100, 30_000)
    assert len(sample) == 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_ten_gigabytes_train_in_two_gigabytes_of_memory() -> None:
    process = subprocess.run(
        [sys.executable, "-c", _TRAIN_ON_10_GB], capture_output=True, text=True, check=True
    )
    vocab_size, peak_bytes = map(int, process.stdout.split())
    assert vocab_size == 6400
    assert peak_bytes < 2e9


def test_each_chat_role_becomes_one_token() -> None:
    tokenizer = train_tokenizer(["长江是中国最长的河流，它流入东海。"] * 400, vocab_size=400)
    assert [len(tokenizer.encode(f"{role}\n")) for role in ROLES] == [2] * len(ROLES)
