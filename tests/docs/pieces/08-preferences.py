"""The piece computes the optimal policies and the losses of the chapter."""

import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

OUTPUTS = Chapter("08-preferences").outputs
BETAS = [0.1, 0.3, 0.5, 1, 2, 5, 10]


def check(page: PiecePage) -> None:
    for line in (OUTPUTS / "optimum.txt").read_text("utf-8").splitlines():
        beta, *policy, reward, kl = re.findall(r"[\d.]+", line)
        page.write("beta", str(BETAS.index(float(beta))))
        assert page.texts("td:nth-child(2)") == policy
        assert page.text("kl").endswith(f" {reward}, KL {kl}")

    words = {"en": ("loss", "gradient"), "zh": ("损失", "梯度")}[page.lang]
    for line in (OUTPUTS / "gradient.txt").read_text("utf-8").splitlines():
        d, beta, loss, gradient = re.findall(r"-?[\d.]+", line)
        page.write("beta", str(BETAS.index(float(beta))))
        page.write("chosen", d)
        assert page.text("loss") == f"{words[0]} {loss}, {words[1]} {gradient}"
    page.write("chosen", "1.5")
    page.write("rejected", "-2.5")
    assert page.text("rewards").endswith(" 3.000, -5.000; d = 4")  # beta is 2
    page.write("smoothing", "0.1")
    assert page.text("loss").startswith(f"{words[0]} 0.800, ")  # 0.9 * 0.0003 + 0.1 * 8.0003
    page.write("kind", "ipo")
    assert page.text("loss") == f"{words[0]} 14.063, {words[1]} 7.500"  # (4 - 1/4) squared
    assert page.part("smoothing").get_attribute("disabled")
