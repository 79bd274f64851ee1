"""A corpus that resembles Chinese web text, with planted copies."""

import json
import random
from itertools import accumulate
from pathlib import Path

_COMMON = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]


class Corpus:
    """Documents of random words with Zipf's frequencies. The same seed gives the same corpus."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        lengths = [self._rng.randint(1, 4) for _ in range(4000)]
        self._words = ["".join(self._rng.choices(_COMMON, k=length)) for length in lengths]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(len(lengths))))

    def document(self, characters: int = 500) -> str:
        """Return a document of about this length, in sentences and paragraphs."""
        parts: list[str] = []
        size = 0
        while size < characters:
            count = self._rng.randint(4, 12)
            words = self._rng.choices(self._words, cum_weights=self._weights, k=count)
            parts.append("".join(words) + self._rng.choice(["，", "，", "。", "。\n"]))
            size += len(parts[-1])
        return "".join(parts).rstrip("，\n") + "。"

    def edited(self, text: str, share: float) -> str:
        """Replace passages of 2 to 10 characters until `share` of the text is edited."""
        result, left = text, max(int(share * len(text)), 1)
        while left > 0:
            length = min(self._rng.randint(2, 10), left)
            start = self._rng.randrange(len(result) - length)
            new = "".join(self._rng.choices(_COMMON, k=length))
            result = result[:start] + new + result[start + length :]
            left -= length
        return result

    def noisy(self, text: str) -> str:
        """Return a copy with other punctuation, white space and width: an exact duplicate."""
        text = text.replace("，", " , ").replace("。", "！").replace("\n", "\r\n\r\n")
        return f"\u3000\u3000{text}"


def write_texts(path: Path, texts: list[str]) -> Path:
    """Write a JSON Lines file of texts."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
