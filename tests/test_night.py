"""The road `night`: its data, its sweeps, and its settings."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import night_sweep, quality_per_token
from benchmarks.night_data import EIGHT, HELD_OUT, cut, filtered, link, share
from minimind.cli.road import stage_recipes
from minimind.config import load_recipe, variants
from minimind.config.road import load_road
from minimind.data.schemas import Record
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.tokenizer.chat import Message

PARAPHRASES = (
    *DEMO_QUESTIONS,
    "长江在哪里？",
    "命名发射到太空的第一颗卫星。",
    "苏联发射的卫星是世界首颗吗？",
    "“泰山”是哪个省的山？",
    "地球上最高的山是什么？",
    "哪座山峰的海拔最高？",
    "珠穆朗玛峰有多高？",
    "谁发现了引力定律？",
    "写五个关于熊猫的事实。",
    "解释为什么海洋是咸的",
    "你是谁？",
    "请告诉我你的名字。",
    "请介绍一下你自己",
    "What is the highest mountain in the world?",
    "Who discovered gravity?",
    "What's your name?",
)
OTHERS = (
    "如何做一道简单的家常菜？",
    "写一封求职信，介绍自己的经历。",
    "太阳系有几颗行星？",
    "他叫什么名字？",
    "你喜欢爬山吗？",
    "黄河有多长？",
)


def chat(*texts: str) -> Record:
    roles = ("user", "assistant")
    messages: list[Message] = [
        {"role": roles[number % 2], "content": text} for number, text in enumerate(texts)
    ]
    return Record(messages=messages)


@pytest.mark.parametrize("question", PARAPHRASES)
def test_wordings_of_the_eight_questions_are_found(question: str) -> None:
    assert EIGHT.search(question)


@pytest.mark.parametrize("question", OTHERS)
def test_other_questions_are_kept(question: str) -> None:
    assert not EIGHT.search(question)


def test_dialogues_are_dropped_for_a_counted_reason() -> None:
    """The subject counts in questions only; a later turn counts too; long ones lose turns."""
    records = [
        chat("黄河有多长？", "5464 千米，比长江短。"),
        chat("你好", "你好！", "泰山在哪？", "在山东。"),
        chat("给我写一首诗！", "好的。"),
        chat("你会什么？", "作为一个AI，我会聊天。"),
        chat("讲个故事", "很" * 700),
        chat("一", "二", "三", "四" * 600),
        Record(
            chosen=chat("你叫什么？", "甲").messages, rejected=chat("你叫什么？", "乙").messages
        ),
    ]
    counts: Counter[str] = Counter()
    kept = list(filtered(records, {"给我写一首诗"}, counts))
    assert [len(value["conversations"]) for value in kept] == [2, 2]
    assert counts == {
        "records": 7,
        "eight questions": 2,
        "prompt of the evaluation": 1,
        "other assistant": 1,
        "too long": 1,
    }
    assert cut(records[5].messages or []) == (records[5].messages or [])[:2]


def test_shares_repeat_or_select() -> None:
    values = [{"n": number} for number in range(4)]
    assert share(values, 0.5) == [{"n": 0}, {"n": 2}]
    assert Counter(value["n"] for value in share(values, 2.5)) == {0: 3, 1: 2, 2: 3, 3: 2}
    assert share(values, 1.0) == values


def test_parts_are_linked_once(tmp_path: Path) -> None:
    part = tmp_path / "part-00003.jsonl.zst"
    part.write_bytes(b"x")
    for _ in range(2):
        link(part, tmp_path / "text" / "life" / "a")
    assert [path.name for path in (tmp_path / "text" / "life").iterdir()] == [f"a-{part.name}"]


def test_the_sweeps_are_valid_and_take_about_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variant loads; all compare the same held-out text; the law varies shape and tokens."""
    sweeps: list[night_sweep.Sweep] = []
    monkeypatch.setattr(night_sweep.Program, "sweep", lambda self, sweep: sweeps.append(sweep))
    (tmp_path / "recipe.toml").write_text(night_sweep.RECIPE)
    night_sweep.Program(tmp_path / "data", tmp_path, dry_run=True).run()
    assert sum(sweep.seconds for sweep in sweeps) <= 1.2 * 3600
    sizes = set()
    for sweep in sweeps:
        recipe, *arguments = sweep.arguments(tmp_path / "data", tmp_path)
        overrides = [argument for argument in arguments if "=" in argument]
        for variant in variants(overrides):
            loaded = load_recipe(recipe, overrides=variant.overrides).recipe
            assert [Path(file.path).name for file in loaded.data.validation] == [HELD_OUT]
            assert loaded.training.global_batch_size * loaded.data.seq_len == 16_384
            if sweep.name.startswith("law"):
                sizes.add((loaded.model.hidden_size, loaded.training.steps))
    assert len(sizes) == sum(map(len, night_sweep.LAW.values()))


def test_all_variants_of_the_comparison_are_valid_and_see_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[night_sweep.Sweep] = []
    monkeypatch.setattr(night_sweep.Program, "sweep", lambda self, sweep: sweeps.append(sweep))
    monkeypatch.setattr(quality_per_token.Comparison, "best_rate", lambda self: "1e-3")
    (tmp_path / "recipe.toml").write_text(night_sweep.RECIPE)
    comparison = quality_per_token.Comparison(tmp_path / "data", tmp_path, "5M", 3e6)
    comparison.compare(["chosen", "adamw", *quality_per_token.VARIANTS])
    names = []
    for sweep in sweeps:
        recipe, *arguments = sweep.arguments(tmp_path / "data", tmp_path)
        for variant in variants([argument for argument in arguments if "=" in argument]):
            loaded = load_recipe(recipe, overrides=variant.overrides).recipe
            assert loaded.training.steps is not None
            tokens = loaded.training.steps * loaded.training.global_batch_size * loaded.data.seq_len
            assert tokens == pytest.approx(3e6, rel=1e-2)
            names.append(f"{sweep.name}/{variant.name}")
    assert len(names) == len(set(names)) == 20


def test_the_road_starts_from_local_folders() -> None:
    """The variant without the textbook has the same stages and no textbook."""
    road = load_road("night")
    assert tuple(road.evaluation.questions) == DEMO_QUESTIONS
    without = load_road("benchmarks/records/night/without-textbook.toml")
    assert list(road.stages) == list(without.stages) == ["pretrain", "sft", "sft-multi", "dpo"]
    two_hours = load_road("benchmarks/records/night/two-hours.toml")
    assert without.stages["pretrain"] == two_hours.stages["pretrain"], "it is copied"
    recipes = stage_recipes(road, Path("out"), "cpu")
    assert [r.objective for r in recipes.values()] == ["pretrain", "sft", "sft", "dpo"]
    shape = recipes["pretrain"].model.shape(night_sweep.VOCAB)
    names = [getattr(shape, key) for key in night_sweep._KEYS]
    assert tuple(names) == night_sweep.SHAPES["5M"][0]
    paths = json.dumps([stage.data for stage in without.stages.values()])
    assert "textbook" not in paths and "textbook" in json.dumps(road.model_dump())
