from collections import Counter

import pytest

from minimind.data.textbook import (
    DEMO_QUESTIONS,
    QuizQuestion,
    Subject,
    demo_questions,
    is_correct,
    is_well_formed,
    load_subjects,
    quiz,
    sample_quiz,
)

TAISHAN = QuizQuestion(
    "你知道泰山在哪里吗？",
    (("山东省", "山东"),),
    "山峰",
    "泰山位于山东省。",
    ("陕西省", "陕西", "湖南省", "湖南", "山西", "河南"),
)
LENGTH = QuizQuestion("长江有多长？", (("6300公里",),), "河流", "长江长6300公里。", ("5464公里",))
PRODUCT = QuizQuestion("4乘3等于多少？", (("12",),), "算术", "4乘3等于12。", ("1", "2", "15"))
ONCE = QuizQuestion("你知道3乘1等于多少吗？", (("3",),), "算术", "3乘1等于3。", ("2", "4"))
DONG = QuizQuestion("越南盾是哪国的货币？", (("越南",),), "国家", "越南盾是越南的货币。")
NAME = QuizQuestion("你叫什么名字？", (("MiniMind",),), "自我认识", "我叫MiniMind。", ("开源",))
PANDA = QuizQuestion("大熊猫吃什么？", (("竹子",),), "动物", "大熊猫吃竹子。", ("鱼和磷虾",))
CAPITAL = QuizQuestion(
    "What is the capital of France?", (("Paris",),), "English", "It is Paris.", ("Rome", "Oslo")
)
SALT = QuizQuestion(
    "海水为什么是咸的？",
    (("盐",),),
    "自然常识",
    "因为河流把岩石中的盐分带进了大海，所以海水是咸的。",
)
SWIMS = QuizQuestion("企鹅有什么本领？", (("游泳",),), "动物", "企鹅不会飞却很会游泳。")
POEM = QuizQuestion("上一句是什么？", (("桃花潭水深千尺",),), "名句", "是“桃花潭水深千尺”。")
SILVER = QuizQuestion("“银”的量词？", (("银",),), "化学元素", "是银。", ("金", "铁"))
BOTH = QuizQuestion("李白是谁？", (("唐朝", "唐代"), ("诗人",)), "人物", "李白是唐朝诗人。")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (TAISHAN, "泰山位于山东省。"),
        (TAISHAN, "泰山在山东。"),
        (TAISHAN, "  泰山位于山东省泰安市，是五岳之首！\n"),
        (TAISHAN, "他说：“泰山在山东。”"),
        (TAISHAN, "泰山不在山西，在山东省。"),
        (TAISHAN, "泰山在哪里？泰山在山东省。"),
        (LENGTH, "长江全长约6300公里。"),
        (LENGTH, "长江全长约6,300公里。"),
        (LENGTH, "长江全长约６３００公里。"),
        (PRODUCT, "4乘3等于12。"),
        (PRODUCT, "答案是12，因为3加3加3加3是12。"),
        (ONCE, "3乘1等于3。"),
        (ONCE, "3×1=3，读作3乘1等于3。"),
        (NAME, "我叫minimind。"),
        (CAPITAL, "The capital of France is Paris."),
        (CAPITAL, "It is not Rome, it is Paris."),
        (SILVER, "是银，不是金属的名字。"),
        (SALT, "因为水飞走了，盐没有飞走。"),
        (TAISHAN, "泰山在山东，并不在山西。"),
        (BOTH, "李白是唐代的大诗人。"),
        (SALT, "海水里有盐分，不是糖。"),
        (SALT, "河流不断把盐分带进大海。"),
        (TAISHAN, "泰山不在山西而在山东省。"),
        (SWIMS, "它虽然不会飞却很会游泳。"),
        (SWIMS, "企鹅会游泳。"),
        (POEM, "“不及汪伦送我情”的上一句是“桃花潭水深千尺”。"),
        (CAPITAL, "The capital is not Rome but Paris."),
    ],
)
def test_right_answers_are_recognized(question: QuizQuestion, answer: str) -> None:
    assert is_correct(question, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        # no answer, or another one
        (TAISHAN, ""),
        (TAISHAN, "。"),
        (TAISHAN, "知道。"),
        (TAISHAN, "泰山位于湖南省。"),
        (BOTH, "李白是唐朝人。"),
        (BOTH, "李白是诗人。"),
        # several options
        (TAISHAN, "泰山在山东省或者湖南省。"),
        (TAISHAN, "泰山可能在山东，也可能在河南。"),
        (SILVER, "是银或金。"),
        (CAPITAL, "It is Paris or Rome."),
        # negated, or inside a question
        (TAISHAN, "泰山不在山东省。"),
        (TAISHAN, "泰山不是在山东省。"),
        (TAISHAN, "泰山没有在山东省。"),
        (TAISHAN, "泰山不一定在山东省。"),
        (TAISHAN, "我不知道泰山是否在山东。"),
        (TAISHAN, "泰山在山东省吗？"),
        (PANDA, "大熊猫不吃竹子。"),
        (PANDA, "大熊猫不喜欢吃竹子。"),
        (NAME, "我不叫MiniMind。"),
        (CAPITAL, "The capital of France is not Paris."),
        (CAPITAL, "It isn't in Paris."),
        (CAPITAL, "It is not true that the capital of France is Paris."),
        (SALT, "因为河流不把岩石中的盐分带进海里。"),
        (SALT, "因为没有一条河流把岩石中的盐分带进海里。"),
        (TAISHAN, "我不认为泰山在山东省。"),
        (SWIMS, "企鹅不会游泳。"),
        (LENGTH, "长江没有那么长，从来不到6300公里。"),
        (TAISHAN, "很难说泰山在山东。"),
        (TAISHAN, "别以为泰山在山东省。"),
        (PANDA, "大熊猫拒绝吃竹子。"),
        (PANDA, "竹子并不是大熊猫的食物。"),
        (BOTH, "唐朝诗人从来没有李白。"),
        (CAPITAL, "Paris is not the capital of France."),
        # part of another number or word
        (LENGTH, "长江全长约16300公里。"),
        (LENGTH, "长江全长约0.6300公里。"),
        (PRODUCT, "4乘3等于120。"),
        (PRODUCT, "4乘3等于12.5。"),
        (PRODUCT, "4乘3等于-12。"),
        (CAPITAL, "It is Parisian."),
        # only in the repeated question
        (ONCE, "3乘1等于1。"),
        (ONCE, "３ × 1 = 1。"),
        (ONCE, "1乘3等于1乘3。"),
        (ONCE, "你知道3乘1等于多少吗。"),
        (ONCE, "3.5乘1等于1。"),
        (DONG, "越南盾是哪国的货币。"),
        # without an end, or repetitive
        (TAISHAN, "泰山位于山东省"),
        (TAISHAN, "泰山位于山东省，"),
        (TAISHAN, "山东山东山东山东山东。"),
        (TAISHAN, "泰山在山东省，泰山在山东省，泰山在山东省。"),
        (TAISHAN, "泰山在山东省省省省省。"),
        (PRODUCT, "4乘3等于12，不是100000000000。"),
    ],
)
def test_wrong_answers_are_recognized(question: QuizQuestion, answer: str) -> None:
    assert not is_correct(question, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "泰山位于山东省。",
        "他说：“泰山在山东。”",
        "1,400,000,000人。",
        "春天花开，夏天很热……秋天叶子黄了！",
        "It is Paris.",
        "湖南的省会是长沙。",
    ],
)
def test_well_formed_answers_are_recognized(answer: str) -> None:
    assert is_well_formed(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "。",
        "？！",
        "泰山位于",
        "泰山位于山东省，",
        "泰山\ufffd\ufffd。",
        "泰山在山东，泰山在山东。",
        "是的是的是的是的。",
        "因为水水水水水分。",
        "我是100000000000000。",
        "这是一座山，它很高" + "，山上有树，林中有鸟，溪里有鱼" * 20 + "。",
        "".join(f"第{number}座山在第{number}个省。" for number in range(30)),
    ],
)
def test_malformed_answers_are_recognized(answer: str) -> None:
    assert not is_well_formed(answer)


def test_demo_questions_exist_and_their_own_answers_are_right() -> None:
    questions = demo_questions()
    assert tuple(question.question for question in questions) == DEMO_QUESTIONS
    assert len(set(DEMO_QUESTIONS)) == 8
    for question in questions:
        assert is_correct(question, question.answer) and is_well_formed(question.answer)
        assert not is_correct(question, "我不知道。")
        others = [other for other in questions if other is not question]
        assert not any(is_correct(question, other.answer) for other in others)


def test_answers_of_the_row_are_right_and_of_other_rows_wrong(
    rivers: Subject,
) -> None:
    questions = quiz([rivers])
    assert len(questions) == 20
    for question in questions:
        others = [one for one in questions if one.answer != question.answer]
        assert is_correct(question, question.answer)
        assert not any(is_correct(question, one.answer) for one in others)


def test_a_sample_is_spread_evenly_over_subjects() -> None:
    titles = {subject.title for subject in load_subjects()}
    chosen = sample_quiz(400, seed=1)
    counts = Counter(question.subject for question in chosen)
    assert counts.keys() == titles and counts.total() == 400
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({question.question for question in chosen}) == 400
    assert chosen == sample_quiz(400, seed=1)
    assert len(set(chosen) & set(sample_quiz(400, seed=2))) < 100


def test_a_large_sample_contains_all_questions(rivers: Subject) -> None:
    assert set(sample_quiz(1_000, 1, [rivers])) == set(quiz([rivers]))
    assert len(sample_quiz(7, 1, [rivers])) == 7
    assert sample_quiz(0, 1, [rivers]) == []
