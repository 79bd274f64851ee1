import random
from pathlib import Path

import pytest

from tests.support.data_files import COMPRESSIONS, json_lines_bytes, reason_of, records_of


@pytest.mark.parametrize("compression", [ending for ending in COMPRESSIONS if ending])
def test_a_truncated_or_damaged_compressed_file_is_an_error(
    compression: str, tmp_path: Path
) -> None:
    rng = random.Random(4)
    lines = [{"text": "".join(rng.choices("江河湖海山川", k=50))} for _ in range(2_000)]
    content = COMPRESSIONS[compression](json_lines_bytes(lines))
    path = tmp_path / f"cut.jsonl{compression}"
    cuts = [1, 2, 3, 5, 9, len(content) // 2, *range(len(content) - 9, len(content))]
    for cut in cuts:
        assert "download it again" in reason_of(path, content[:cut]) or cut < 10
    path.write_bytes(content + content)  # the result of `cat a.gz b.gz`
    assert len(records_of(path)) == 2 * len(lines)
