import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minimind.evaluation.report import StageReport, _lines, write_report

Make = Callable[..., str]
SECTIONS = [
    "The eight questions",
    "Stages",
    "Loss",
    "Bits per byte",
    "Learning rate",
    "Tokens per second",
    "Quiz by subject",
    "A name of its own",
    "What the model wrote on the way",
    "Recipes",
]
EVIL = "<script>alert('x')</script>&amp;\"><img src=x onerror=y>\x00\x1b[0m\ufffd\n第二行"


def train(step: int, **more: Any) -> dict[str, Any]:
    figures = {"loss": 9 / step, "bits_per_byte": 3 / step, "tokens_per_second": 5e4 + step}
    return {"kind": "train", "step": step, "lr/adamw": 3e-4, "lr/muon": 2e-2} | figures | more


def validation(step: int) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "loss": 9.5 / step, "bits_per_byte": 3.2 / step}


def sample(step: int, text: str) -> dict[str, Any]:
    return {"kind": "sample", "step": step, "prompt": "长江是", "text": text}


def stage(name: str = "pretrain", metrics: list[dict[str, Any]] | None = None) -> StageReport:
    whole = [*map(train, range(1, 60)), validation(30), validation(59), sample(59, "中国的河。")]
    summary = {"parameters": 1234567, "seconds": 61.7, "loss": 0.16, "unigram_bits_per_byte": 2.25}
    return StageReport(name, summary, whole if metrics is None else metrics, "[model]\nwidth = 8\n")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`page(…)`: the page of a full report, of which any part can be given."""

    def make(**parts: Any) -> str:
        eight = {
            "question": "你叫什么名字？",
            "before_training": "？？",
            "after_pretraining": "名字",
            "after_fine_tuning": "我叫MiniMind。",
            "after_preferences": "我叫MiniMind。",
            "correct": True,
        }
        whole = {
            "title": "my run",
            "lead": "A small model.",
            "cards": {"quiz": "91.0%"},
            "stages": [stage(), stage("sft")],
            "eight": [eight, eight | {"question": "泰山？", "correct": False}],
            "identity": [
                {
                    "question": "你是何人？",
                    "before": "我叫MiniMind。",
                    "after": "我是小满。",
                    "right": True,
                }
            ],
            "by_subject": {"河流": (3, 4), "山峰": (1, 4), "English": (4, 4)},
            "wrong": [{"question": "华山在哪？", "answer": "在山东。", "expected": "在陕西。"}],
        }
        file = tmp_path_factory.mktemp("report") / "report.html"
        write_report(file, **(whole | parts))
        return file.read_text("utf-8")

    return make


@pytest.fixture(scope="module")
def full(page: Make) -> str:
    """The page of the full report."""
    return page()


class Elements(HTMLParser):
    """Every tag with its attributes, the text, and whether what opens is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_sections_are_there_with_what_they_show(full: str) -> None:
    assert re.findall("<h2>(.*?)</h2>", full) == SECTIONS
    # Below each title is a sentence for learners.
    assert len(re.findall(r"</h2><p class=faint>[A-Z][^<]{60,}\.</p>", full)) == len(SECTIONS)
    text = Elements(full).text
    for shown in (
        "my run",
        "A small model.",
        "91.0%",
        "我叫MiniMind。",
        "1,234,567",
        "2.250",
        "中国的河。",
        "width = 8",
        "华山在哪？",
        "在陕西。",
        "1 wrong answers",
    ):
        assert shown in text, shown
    assert (full.count("✓</b>"), full.count("✗</b>")) == (2, 1)


def test_there_is_a_plot_a_stage_and_it_needs_no_font(full: str) -> None:
    plots = re.findall("<figure>(.*?)</figure>", full, re.S)
    assert len(plots) == 4 * 2
    assert all("<path" in plot and "<text" not in plot for plot in plots)
    assert "currentColor" in full and "#010203" not in full


def test_the_page_needs_nothing_from_elsewhere(full: str) -> None:
    assert "http:" not in full and "https:" not in full and "@import" not in full
    for tag, attributes in Elements(full).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#")
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", full))
    assert len(full.encode()) < 1_000_000


def test_what_a_model_or_a_user_wrote_stays_text(page: Make) -> None:
    metrics = [train(1), sample(1, EVIL), sample(1, EVIL) | {"prompt": EVIL}]
    html = page(
        title=EVIL,
        lead=EVIL,
        cards={EVIL: EVIL},
        stages=[StageReport(EVIL, {}, metrics, EVIL)],
        eight=[
            dict.fromkeys(
                ("question", "before_training", "after_pretraining", "after_fine_tuning"), EVIL
            )
            | {"after_preferences": EVIL, "correct": False}
        ],
        identity=[dict.fromkeys(("question", "before", "after"), EVIL) | {"right": False}],
        by_subject={EVIL: (1, 2)},
        wrong=[dict.fromkeys(("question", "answer", "expected"), EVIL)],
    )
    elements = Elements(html)
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    shown = "<script>alert('x')</script>&amp;\"><img src=x onerror=y>\ufffd\ufffd[0m\ufffd\n第二行"
    assert elements.text.count(shown) >= 15
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)


def test_the_weakest_subject_comes_first(full: str) -> None:
    section = full[full.index("Quiz by subject") :]
    assert section.index("山峰") < section.index("河流") < section.index("English")
    assert re.findall("width:([0-9]+%)", section) == ["25%", "75%", "100%"]
    assert "3/4" in section


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [train(10)],
        [validation(10)],
        [train(10), train(20), validation(20)],
        [train(10, loss=math.nan, bits_per_byte=math.inf), train(20, loss=None)],
        [train(10, **{"lr/adamw": 0.0, "lr/muon": 0.0, "tokens_per_second": 0.0})],
        [{"kind": "train", "step": 0, "loss": 7}],
    ],
    ids=["none", "one", "validation", "few", "not finite", "zero", "step 0"],
)
def test_few_lines_of_metrics_are_enough(page: Make, metrics: list[dict[str, Any]]) -> None:
    html = page(stages=[StageReport("pretrain", {}, metrics, "")])
    plots = html.count("<svg ") + html.count("Nothing was measured.")
    assert plots == 4
    assert html.count("<svg ") > 0 or not metrics


def test_a_number_that_is_none_does_not_spoil_its_neighbours(page: Make) -> None:
    metrics = [*map(train, range(1, 400))]
    for odd in (math.nan, math.inf, None):
        metrics[200] = train(201, loss=odd)
        html = page(stages=[stage(metrics=metrics)])
        del metrics[200]["loss"]
        assert html == page(stages=[stage(metrics=metrics)])


def test_experts_are_shown_where_there_are_any(page: Make) -> None:
    loads = {f"expert_load/{name}": 0.25 for name in (0, 1, 2, 3, "most", "least")}
    figures = loads | {"router_entropy": 1.2, "dropped_tokens": 0, "balance": 1.0}
    lines = [train(step, **figures) for step in range(1, 20)]
    lines.append(validation(19) | figures | {"expert_load/0": 9.0})
    html = page(stages=[stage(), stage("moe", lines)])
    titles = re.findall("<h2>(.*?)</h2>", html)
    own = ["Expert load", "Dropped tokens", "Router entropy"]
    assert [name for name in titles if name not in SECTIONS] == own
    assert html.count("<svg ") == 4 * 2 + 3
    lines[-1]["expert_load/0"] = 0.25  # the plot of the load is that of training
    assert html == page(stages=[stage(), stage("moe", lines)])


def test_preferences_are_shown_where_there_are_any(page: Make) -> None:
    names = ("rewards/chosen", "rewards/rejected", "rewards/margin", "logps/chosen", "accuracy")
    figures = dict.fromkeys(names, 0.5)
    lines = [train(step, **figures) for step in range(1, 20)] + [validation(19) | figures]
    for line in lines:
        del line["bits_per_byte"]
    html = page(stages=[stage(), stage("dpo", lines)])
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert [name for name in titles if name not in SECTIONS] == ["Preferences"]
    # Two of any stage, two of the other stage alone, four of the pairs.
    assert html.count("<svg ") == 2 * 2 + 2 + 4
    alone = page(stages=[stage("dpo", lines)])
    assert "Nothing was measured" not in alone
    assert "Bits per byte" not in re.findall("<h2>(.*?)</h2>", alone)


def test_a_stage_without_validation_shows_training_alone(page: Make) -> None:
    alone = page(stages=[stage(metrics=[train(step) for step in range(1, 9)])])
    both = page(stages=[stage(metrics=[*map(train, range(1, 9)), validation(8)])])
    assert alone.count("<svg ") == both.count("<svg ") == 4
    assert len(both) > len(alone)


def test_sections_without_content_are_left_out(page: Make) -> None:
    html = page(eight=[], identity=[], by_subject={}, wrong=[], stages=[stage(metrics=[train(1)])])
    left = [
        name
        for name in SECTIONS
        if not name.startswith(("The eight", "Quiz", "A name", "What the"))
    ]
    assert re.findall("<h2>(.*?)</h2>", html) == left


def test_a_long_run_has_a_small_page_that_shows_its_end(page: Make) -> None:
    metrics = [train(step, loss=3 + math.sin(step**2)) for step in range(10, 300_000, 10)]
    for step in range(1_000, 300_000, 1_000):
        metrics += [validation(step), sample(step, f"到了{step}步。" + "很长的话。" * 60)]
    html = page(stages=[stage(metrics=metrics)])
    assert len(html.encode()) < 250_000
    assert "到了299000步。" in html
    assert 20 <= html.count("到了") <= 40


def test_the_same_run_gives_the_same_bytes(page: Make, full: str) -> None:
    assert page() == full


def test_a_stage_is_read_from_its_run_directory(tmp_path: Path) -> None:
    lines = [train(10), sample(10, "第一行\u2028还是第一行")]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "summary.json").write_text('{"loss": 1.5}', encoding="utf-8")
    (tmp_path / "recipe.toml").write_text("# 一\n", encoding="utf-8")
    assert StageReport.read("sft", tmp_path) == StageReport("sft", {"loss": 1.5}, lines, "# 一\n")


def test_general_data_has_a_line_of_its_own(page: Make) -> None:
    general = {"general_loss": 2.0, "general_bits_per_byte": 0.7}
    lines = [train(1), validation(1) | general, train(2), validation(2) | general]
    found = _lines(lines, "loss")
    assert found["general"] == [(1, 2.0), (2, 2.0)] and found.keys() == {
        "train",
        "validation",
        "general",
    }
    assert _lines(lines, "bits_per_byte")["general"] == [(1, 0.7), (2, 0.7)]
    assert page(stages=[stage("lora", lines)]) != page(stages=[stage("lora", lines[:1])])
