"""Every stage of the map names a chapter, files and a command that exist."""

import json

from docs.book.chapters import DOCS, ROOT, Chapter
from tests.support.pieces import PiecePage

STAGES = json.loads((Chapter("16-where-next").outputs / "piece.json").read_text("utf-8"))


def check(page: PiecePage) -> None:
    commands = (DOCS / "en" / "reference" / "cli.md").read_text("utf-8")
    assert page.texts('[data-id="stages"] button') == [
        stage["names"][page.lang == "zh"] for stage in STAGES
    ]
    for number, stage in enumerate(STAGES):
        if number % 2:
            page.click('[data-id="next"]')
        else:
            page.click('[data-id="stages"] button', number)
        name = stage["names"][page.lang == "zh"]
        assert page.text("name") == f"{number + 1}. {name}"
        assert page.part("chapter").get_attribute("href").endswith(f"/{stage['chapter']}.html")
        assert page.text("chapter") == str(int(stage["chapter"][:2]))
        for file in page.text("files").splitlines():
            assert (ROOT / file).is_file(), file
        words = stage["command"].split()
        assert page.text("command") == f"minimind {stage['command']}"
        known = [f"## minimind {' '.join(words[:count])}\n" for count in (1, 2)]
        assert any(heading in commands for heading in known), stage["command"]
    assert page.part("next").get_attribute("disabled")
    page.click('[data-id="back"]')
    assert page.text("name").startswith(f"{len(STAGES) - 1}. ")
