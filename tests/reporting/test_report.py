import json
import math
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import DataError
from minimind.reporting.report import make_report
from tests.support.plots import draw_equal_plots_once, draw_placeholders
from tests.support.run_folders import sample, train, usual_metrics, validation, write_run

EVIL = "<script>alert('x')</script>&amp;\"><img src=x onerror=y>\x00\x1b[0m\ufffd\n第二行"
ESCAPED = "<script>alert('x')</script>&amp;\"><img src=x onerror=y>\ufffd\ufffd[0m\ufffd\n第二行"
DEMO = {
    "stages": {},
    "quiz": {
        "correct": 8,
        "fluent": 7,
        "questions": 12,
        "by_subject": {
            "河流": {"correct": 3, "questions": 4},
            "山峰": {"correct": 1, "questions": 4},
            "English": {"correct": 4, "questions": 4},
        },
        "wrong": [{"question": "华山在哪？", "answer": "在山东。", "expected": "在陕西。"}],
    },
    "questions": [
        {
            "question": "你叫什么名字？",
            "before_training": "？？",
            "after_pretraining": "名字",
            "after_fine_tuning": "我叫MiniMind。",
            "after_preferences": "我叫MiniMind。",
            "correct": right,
            "fluent": not right,
        }
        for right in (True, False)
    ],
    "identity": {
        "correct": 1,
        "questions": 1,
        "answers": [{"question": "你是何人？", "before": "我。", "after": "小满。", "right": True}],
    },
}
SECTIONS = [
    "Answers after each stage",
    "Stages",
    "Loss",
    "Bits per byte",
    "Learning rate",
    "Tokens per second",
    "Memory",
    "Quiz by subject",
    "A new name",
    "Samples during training",
    "Recipes",
]
PER_STAGE = 2 + 2 + 1 + 1 + 1  # plots
Page = Callable[..., str]


class Elements(HTMLParser):
    """A parser that collects tags and text, and checks that every tag is closed in order."""

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


def render(*paths: Path, price: float | None = None) -> str:
    out = paths[0].parent / "page" / "report.html"
    make_report(paths, price=price).write(out)
    return out.read_text("utf-8")


@pytest.fixture(autouse=True)
def plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plots only in tests of drawings; `full` has all of them."""
    if request.function in (
        test_few_or_invalid_metrics_still_give_a_page,
        test_a_long_run_has_a_small_page_with_its_last_sample,
        test_several_runs_share_their_axes,
        test_markdown_has_the_same_content_and_separate_plots,
        test_plots_accept_any_name,
    ):
        draw_equal_plots_once(monkeypatch)
    elif request.function is not test_the_same_runs_give_the_same_bytes:
        draw_placeholders(monkeypatch)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `minimind demo` writes it, with two stages."""
    folder = tmp_path_factory.mktemp("complete") / "demo"
    write_run(folder / "zz-pretrain")
    write_run(folder / "sft", init="elsewhere/zz-pretrain", objective="sft")
    (folder / "summary.json").write_text(json.dumps(DEMO), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def full(demo: Path) -> str:
    return render(demo)


def titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_the_demo_has_all_sections(full: str) -> None:
    assert titles(full) == SECTIONS
    # Each title is followed by an explanation.
    assert len(re.findall(r"</h2><p class=faint>[A-Z][^<]{60,}\.</p>", full)) == len(SECTIONS)
    text = Elements(full).text
    fragments = ("minimind: demo", "1,234,567", "2.250", "256 MB", "中国的河。", "hidden_size = 8")
    for part in (
        *fragments,
        "我叫MiniMind。",
        "华山在哪？",
        "在陕西。",
        "1 wrong answers",
        "66.7%",
    ):
        assert part in text, part
    assert (full.count("✓</b>"), full.count("✗</b>")) == (3, 2)
    assert "Problems" not in text


def test_stages_are_in_the_order_of_training(full: str) -> None:
    captions = re.findall("<figcaption>(.*?)</figcaption>", full)
    assert captions[:4] == ["zz-pretrain", "sft", "zz-pretrain, by time", "sft, by time"]
    assert len(captions) == PER_STAGE * 2


def test_plots_need_no_font(full: str) -> None:
    plots = re.findall("<figure>(.*?)</figure>", full, re.S)
    assert all("<path" in plot and "<text" not in plot for plot in plots)
    assert "currentColor" in full and "#010203" not in full


def test_the_page_loads_nothing(full: str) -> None:
    assert "http:" not in full and "https:" not in full and "@import" not in full
    for tag, attributes in Elements(full).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith("#")
    assert all(path.startswith("#") for path in re.findall(r"url\(([^)]*)\)", full))
    assert len(full.encode()) < 1_000_000


def test_texts_of_models_and_users_are_escaped(tmp_path: Path) -> None:
    metrics = [train(1), sample(1, EVIL), sample(1, EVIL, prompt=EVIL)]
    write_run(tmp_path / "runs" / "one", metrics, more=f"# {EVIL}\n".replace("\n第", "\n# 第"))
    demo = json.loads(json.dumps(DEMO).replace(json.dumps("我叫MiniMind。"), json.dumps(EVIL)))
    demo["quiz"]["by_subject"] = {EVIL: {"correct": 1, "questions": 2}}
    (tmp_path / "runs" / "summary.json").write_text(json.dumps(demo), encoding="utf-8")
    (tmp_path / "runs" / "ceval.json").write_text(
        json.dumps({"task": EVIL, "model": EVIL, "settings": {}, "metrics": {EVIL: 1.0}})
    )
    html = render(tmp_path / "runs")
    elements = Elements(html)
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    assert elements.text.count(ESCAPED) >= 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html)
    markdown = (tmp_path / "page" / "report.md").read_text("utf-8")
    outside = re.sub("```.*?```", "", markdown, flags=re.S)
    assert "<script" not in outside and "<img" not in outside and "&lt;script" in outside


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
        [train(10, loss="high", tokens="many", elapsed_s=[])],
        [{"kind": "train", "step": 0, "loss": 7}],
    ],
    ids=["none", "one", "validation", "few", "not finite", "zero", "words", "step 0"],
)
def test_few_or_invalid_metrics_still_give_a_page(
    tmp_path: Path, metrics: list[dict[str, Any]]
) -> None:
    html = render(write_run(tmp_path / "one", metrics))
    Elements(html)
    assert {"Stages", "Recipes"} <= set(titles(html))


def test_an_invalid_value_is_skipped(tmp_path: Path) -> None:
    metrics = [*map(train, range(1, 400))]
    pages = set()
    for number, odd in enumerate((math.nan, math.inf, None, "no")):
        metrics[200] = train(201, loss=odd)
        if odd == "no":
            del metrics[200]["loss"]
        pages.add(render(write_run(tmp_path / str(number) / "one", metrics)))
    assert len(pages) == 1


def test_a_mixture_of_experts_has_a_section(tmp_path: Path) -> None:
    loads = {f"expert_load/{name}": 0.25 for name in (0, 1, "max", "min")}
    metrics = loads | {"router_entropy": 1.2, "dropped_tokens": 0, "balance_loss": 1.0}
    lines = [train(step, **metrics) for step in range(1, 20)]
    html = render(write_run(tmp_path / "moe", lines))
    own = ["Expert load", "Dropped tokens", "Router entropy"]
    assert [name for name in titles(html) if name not in SECTIONS] == own
    assert html.count("<svg ") == PER_STAGE + 3


def test_preference_optimization_has_a_section(tmp_path: Path) -> None:
    names = ("rewards/chosen", "rewards/rejected", "rewards/margin", "logps/chosen", "accuracy")
    metrics = dict.fromkeys(names, 0.5)
    lines = [train(step, **metrics) for step in range(1, 20)] + [validation(19, **metrics)]
    for line in lines:
        del line["bits_per_byte"]
    html = render(write_run(tmp_path / "dpo", lines, objective="dpo"))
    assert [name for name in titles(html) if name not in SECTIONS] == ["Preferences"]
    assert not {"Loss", "Bits per byte"} & set(titles(html))
    assert html.count("<svg ") == 4 + 3


def test_a_long_run_has_a_small_page_with_its_last_sample(tmp_path: Path) -> None:
    metrics = [train(step, loss=3 + math.sin(step**2)) for step in range(10, 300_000, 10)]
    for step in range(1_000, 300_000, 1_000):
        metrics += [validation(step), sample(step, f"到了{step}步。" + "很长的话。" * 60)]
    html = render(write_run(tmp_path / "long", metrics))
    assert len(html.encode()) < 400_000
    assert "到了299000步。" in html
    assert 20 <= html.count("到了") <= 40


def test_the_same_runs_give_the_same_bytes(demo: Path, full: str) -> None:
    assert render(demo) == full


def test_the_page_is_english_and_marks_chinese_text(full: str) -> None:
    assert full.startswith('<!doctype html><html lang="en">')
    assert "<span lang=zh-Hans>我叫MiniMind。</span>" in full


def test_keywords_and_fluency_are_separate_columns(full: str) -> None:
    assert "<th>keywords</th><th>fluent</th>" in full
    right, wrong = "<b class=right>✓</b>", "<b class=wrong>✗</b>"
    for keywords, fluent in ((right, wrong), (wrong, right)):
        row = f'data-name="keywords">{keywords}</td><td data-name="fluent">{fluent}</td>'
        assert row in full
    assert "the weakest subject first; 7 answers are fluent." in full


def test_the_cost_of_training_is_computed_from_a_price(demo: Path, tmp_path: Path) -> None:
    report = make_report([demo], price=36.0)
    assert report.page.cards["cost"] == "1.23"  # 2 * 61.7 s at 0.01 per second
    assert math.isclose(report.metrics["runs"]["sft"]["cost"], 0.617)
    assert "cost" not in make_report([demo]).page.cards


def test_a_stage_includes_the_stages_before_it(tmp_path: Path) -> None:
    base = write_run(tmp_path / "here" / "base")
    write_run(tmp_path / "there" / "chat", init=f"{base}/model", objective="sft")
    report = make_report([tmp_path / "there" / "chat"])
    assert list(report.metrics["runs"]) == ["base", "chat"]
    assert report.page.lead.startswith("A GPT of ")


def test_several_runs_share_their_axes(tmp_path: Path) -> None:
    for number in range(3):
        metrics = [*usual_metrics(), validation(59, loss=2.0 + number)]
        size = {"parameters": 10**number * 1000, "loss": 5.0 * 10 ** (-0.1 * number)}
        write_run(tmp_path / "runs" / f"n{number}", metrics, **size)
    sweep = {f"n{number}": {"optim.lr": number, "seed": number} for number in range(3)}
    contents = {"settings": sweep, "failed": {"n4": "killed by SIGKILL"}}
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(contents))
    report = make_report([tmp_path / "runs"])
    assert report.page.lead == "3 runs."
    by_title = {section.title: section for section in report.page.sections}
    [loss] = by_title["Loss"].blocks
    assert [title for title, _ in loss.plots] == ["pretrain", "pretrain, by time"]
    fit = report.metrics["fits"]["pretrain"]["parameters"]
    assert math.isclose(fit["exponent"], 0.1, rel_tol=1e-6) and fit["points"] == 3
    _, settings, table = (
        by_title["By setting: pretrain"].blocks[0],
        *by_title["By setting: pretrain"].blocks,
    )
    assert [title for title, _ in settings.plots] == ["optim.lr"]
    assert table.head == ["run", "optim.lr", "seed", "loss"]
    assert report.metrics["problems"] == ["n4: killed by SIGKILL"] and report.complete


def test_runs_with_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    roads = [tmp_path / name for name in ("a/road", "b/road", "c/other")]
    for road in roads:
        write_run(road / "pretrain")
        write_run(road / "sft", init=f"{road}/pretrain", objective="sft")
    names = [
        f"{parent}/{stage}" for parent in ("a/road", "b/road") for stage in ("pretrain", "sft")
    ]
    assert list(make_report(roads[:2]).metrics["runs"]) == names
    names += ["c/other/pretrain", "c/other/sft"]
    assert list(make_report(roads).metrics["runs"]) == names
    assert list(make_report(roads[1:2]).metrics["runs"]) == ["pretrain", "sft"]


def test_two_sweeps_may_have_variants_of_the_same_names(tmp_path: Path) -> None:
    for sweep, setting in (("first", "optim.lr"), ("second", "seed")):
        for number in range(2):
            write_run(tmp_path / sweep / f"n{number}", loss=2.0 + number)
        contents = {"settings": {f"n{number}": {setting: number} for number in range(2)}}
        contents["failed"] = {"n2": f"the reason of the {sweep}"}
        (tmp_path / sweep / "sweep.json").write_text(json.dumps(contents))
    write_run(tmp_path / "second" / "n2")  # finished later
    report = make_report([tmp_path / "first", tmp_path / "second"])
    [section] = (each for each in report.page.sections if each.title == "By setting: pretrain")
    _, table = section.blocks
    assert table.head == ["run", "optim.lr", "seed", "loss"]
    assert [row[:3] for row in table.rows] == [
        ["first/n0", "0", "–"],
        ["first/n1", "1", "–"],
        ["second/n0", "–", "0"],
        ["second/n1", "–", "1"],
        ["n2", "–", "–"],
    ]
    assert report.metrics["problems"] == ["n2: the reason of the first"]


def test_runs_of_an_earlier_sweep_in_the_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("lr=1", "lr=2", "layers=4"):
        write_run(tmp_path / "sweep" / name)
    contents = {"settings": {"lr=1": {"optim.lr": 1}, "lr=2": {"optim.lr": 2}}, "failed": {}}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(contents))
    runs = make_report([tmp_path / "sweep"]).inputs.runs
    assert [run.folder.name for run in runs] == ["lr=1", "lr=2"]


def test_fine_tuned_runs_of_two_tokenizers_are_compared_by_bits_per_byte(tmp_path: Path) -> None:
    for name in "ab":
        run = write_run(tmp_path / "runs" / name, init=f"elsewhere/{name}", objective="sft")
        (run / ".tokenizer").mkdir()
        (run / ".tokenizer" / "tokenizer.json").write_text(name)
    contents = {"settings": {name: {"model.init": name} for name in "ab"}}
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(contents))
    page = make_report([tmp_path / "runs"]).page
    [section] = (each for each in page.sections if each.title == "By setting: sft")
    [table] = section.blocks
    assert table.head[-1] == "bits per byte"


def test_several_demos_are_named(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "other")
    page = make_report([demo, tmp_path / "other"]).page
    titles = [section.title for section in page.sections]
    for title in ("Answers after each stage", "Quiz by subject", "A new name"):
        assert f"{title}: demo" in titles and f"{title}: other" in titles
    assert not {"quiz", "questions"} & set(page.cards)


def test_plots_of_a_name_with_spaces(demo: Path, tmp_path: Path) -> None:
    make_report([demo]).write(tmp_path / "my report (1).html")
    text = (tmp_path / "my report (1).md").read_text("utf-8")
    assert "](my%20report%20%281%29-plots/001.svg)" in text
    assert (tmp_path / "my report (1)-plots" / "001.svg").is_file()


def test_runs_of_the_same_size_get_no_fit(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / "runs" / name)
    fits = make_report([tmp_path / "runs"]).metrics["fits"]["pretrain"]
    assert fits["parameters"]["reason"].startswith("no fit: 1 different values")


def test_benchmark_results_are_read_from_the_run_and_from_other_folders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ceval = {"task": "ceval", "model": "run", "settings": {}, "accuracy": 0.27, "correct": 363}
    ceval |= {"questions": 1346, "interval": [0.247, 0.294], "chance": 0.25, "failed": 0}
    ceval["by_group"] = {"STEM": {"correct": 3, "questions": 10, "accuracy": 0.3}}
    bits = {"task": "bpb", "model": "run", "settings": {}, "bits_per_byte": 1.5, "documents": 7}
    single = bits | {"documents": 1, "task": "bpb-one", "interval": [1.25, 1.25]}
    for path, metrics in (
        (run / "eval" / "run", ceval),
        (tmp_path / "apart" / "run", bits),
        (tmp_path / "apart" / "run", single),
    ):
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{metrics['task']}.json").write_text(json.dumps(metrics))
    text = Elements(render(run, tmp_path / "apart")).text
    for fragment in ("27.00%", "24.7% – 29.4%", "363 / 1,346", "1.5000 bits/byte", "STEM", "3/10"):
        assert fragment in text, fragment
    assert "1.2500" not in text, "the interval of a single document"
    separate = make_report([tmp_path / "apart"])
    assert [section.title for section in separate.page.sections] == ["Benchmarks"]


def test_a_run_is_read_while_it_removes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    step = run / "checkpoints" / "step-00000007"
    step.mkdir(parents=True)
    (step / "state.json").symlink_to("gone")
    removed = run / "checkpoints" / ".tmp-step-00000006"
    removed.mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if "tmp-step" in str(path):
            removed.rename(tmp_path / "removed")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(make_report([run]).metrics["runs"]) == ["run"]
    assert not removed.exists()


def test_damaged_files_are_reported_and_the_rest_is_rendered(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "good")
    half = write_run(runs / "half", finished=False, more="[training]\nsteps = 100\n")
    with (half / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff{"kind"\n[1]\n{"kind": "train", "step": 60, "lo')
    broken = write_run(runs / "broken")
    (broken / "summary.json").write_text('{"loss": ')
    (broken / "recipe.toml").write_text("[[[")
    bare = runs / "bare"
    bare.mkdir()
    (bare / "recipe.toml").write_text('objective = "pretrain"\n')
    report = make_report([runs, tmp_path / "nowhere"])
    assert report.metrics["problems"] == [
        f"{tmp_path / 'nowhere'}: no such file or folder",
        "bare: metrics.jsonl is missing",
        "bare: not finished: no steps are logged",
        report.metrics["problems"][3],
        "broken: summary.json: not the summary of a finished run",
        "broken: not finished: 59 steps are logged",
        "half: metrics.jsonl: 3 lines cannot be read",
        "half: not finished: 59 of 100 steps are logged",
    ]
    assert report.metrics["problems"][3].startswith("broken: recipe.toml: not TOML")
    assert not report.complete
    assert report.metrics["runs"]["half"]["tokens"] == 59 * 32 * 4
    assert report.metrics["runs"]["half"]["bits_per_byte"] == 3.2 / 59
    report.write(tmp_path / "report.html")
    text = Elements((tmp_path / "report.html").read_text("utf-8")).text
    assert "half (not finished)" in text and text.count("cannot be read") == 1


def test_folders_without_runs_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder\. Give run directories"):
        make_report([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="contains no run and no benchmark results"):
        make_report([tmp_path])


def test_markdown_has_the_same_content_and_separate_plots(demo: Path, tmp_path: Path) -> None:
    report = make_report([demo])
    stale = tmp_path / "all-plots" / "099.svg"
    stale.parent.mkdir()
    stale.write_text("old")
    report.write(tmp_path / "all.html")
    markdown = (tmp_path / "all.md").read_text("utf-8")
    assert re.findall("^## (.*)$", markdown, re.M) == SECTIONS
    for fragment in ("1,234,567", "华山在哪？", "| 河流 | 3/4 | 75% |", "hidden_size = 8"):
        assert fragment in markdown, fragment
    named = re.findall(r"!\[[^]]*\]\((all-plots/[0-9]+\.svg)\)", markdown)
    assert len(named) == PER_STAGE * 2 and not stale.exists()
    for name in named:
        drawing = (tmp_path / name).read_text("utf-8")
        assert drawing.startswith("<svg xmlns=") and "currentColor" not in drawing


def test_plots_accept_any_name(tmp_path: Path) -> None:
    for name in ("_第一$x$", "第二{", "a^b$"):
        write_run(tmp_path / "runs" / name)
    text = Elements(render(tmp_path / "runs")).text
    assert "_第一$x$" in text
