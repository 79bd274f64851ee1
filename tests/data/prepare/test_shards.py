import random
from pathlib import Path

import pytest

from minimind.data.prepare.shards import WORK_LEVEL, read_shard, write_texts
from minimind.errors import DataError


@pytest.mark.parametrize("num_texts", [0, 3, 20_000])
def test_a_truncated_shard_is_an_error(tmp_path: Path, num_texts: int) -> None:
    rng = random.Random(num_texts)
    texts = [f"第{n}段\n\u2028{rng.random()}" for n in range(num_texts)]
    shard = tmp_path / "00000-00000.jsonl.zst"
    with write_texts(shard, WORK_LEVEL) as writer:
        for text in texts:
            writer.write(text)
    assert list(read_shard(shard)) == texts
    content = shard.read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(DataError, match="changed or removed during the preparation"):
            list(read_shard(shard))
