"""The number that an answer ends with: what GSM8K and CMATH are marked by."""

import re
import unicodedata
from fractions import Fraction

_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_NUMBER = re.compile(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?")


def last_number(text: str) -> Fraction | None:
    """The last number of a text, None where there is none.

    1,234.50 and 3/4 are one number each, as are LaTeX's fractions; a percent sign is not looked at.
    """
    plain = _FRACTION.sub(r" \1/\2 ", unicodedata.normalize("NFKC", text).replace("\u2044", "/"))
    for found in reversed(_NUMBER.findall(plain)):
        whole, _, part = re.sub(r"[,\s]", "", found).partition("/")
        if not part:
            return Fraction(whole)
        if int(part):
            return Fraction(whole) / int(part)
    return None
