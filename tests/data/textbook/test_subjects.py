"""The packaged tables: number of facts and required subjects."""

from minimind.data.textbook import load_subjects, quiz
from minimind.data.textbook.quiz import normalise

# Required contents: (table, column, name, value).
MUST_HOLD = {
    "provinces and capitals": ("provinces", "capital", "浙江", "杭州"),
    "countries and capitals": ("countries", "capital", "法国", "巴黎"),
    "rivers": ("rivers", "mouth", "黄河", "渤海"),
    "mountains": ("mountains", "place", "泰山", "山东省"),
    "dynasties": ("dynasties", "founder", "唐朝", "李渊"),
    "inventions and discoveries": ("inventions", "person", "万有引力", "牛顿"),
    "people": ("people", "profession", "李白", "诗人"),
    "animals and their food": ("animals", "food", "大熊猫", "竹子"),
    "plants": ("plants", "type", "竹子", "禾本科植物"),
    "elements": ("elements", "symbol", "氧", "O"),
    "planets": ("planets", "order", "地球", "第三"),
    "the body": ("body", "function", "鼻子", "闻气味"),
    "festivals": ("festivals", "food", "端午节", "粽子"),
    "foods": ("foods", "ingredient", "豆腐", "大豆"),
    "idioms and what they mean": ("idioms", "meaning", "画蛇添足", "做多余的事"),
    "units": ("units", "value", "1米", "100厘米"),
    "arithmetic": ("arithmetic", "result", "3乘4", "12"),
    "opposites": ("opposites", "opposite", "大", "小"),
    "classifiers": ("classifiers", "classifier", "鱼", "条"),
    "everyday vocabulary in both languages": ("words", "english", "苹果", "apple"),
    "why-questions": ("why", "reason", "海水是咸的", "河流把岩石中的盐分带进了大海"),
    "who the model is": ("identity", "key", "名字", "MiniMind"),
}


def test_there_are_enough_facts_and_subjects() -> None:
    subjects = load_subjects()
    assert sum(subject.num_facts for subject in subjects) >= 1_500
    assert len(subjects) >= 20
    assert len({subject.title for subject in subjects}) == len(subjects)
    assert {subject.language for subject in subjects} == {"zh", "en"}
    assert all(subject.num_facts >= 20 for subject in subjects)


def test_required_subjects_are_present() -> None:
    tables = {subject.path.stem: subject for subject in load_subjects()}
    missing = []
    for kind, (table, column, name, value) in MUST_HOLD.items():
        rows = [row for row in tables[table].rows if row.name == name]
        if (
            not rows
            or value not in rows[0].cells[column]
            or column
            not in {
                relation.column for relation in tables[table].relations if rows[0] in relation.rows
            }
        ):
            missing.append((kind, name, [row.first for row in rows]))
    assert missing == []


def test_every_fact_is_in_the_quiz() -> None:
    questions = {normalise(question.question) for question in quiz()}
    assert len(questions) == len(quiz()) >= 2 * 1_500
    for subject in load_subjects():
        for fact in subject.facts:
            assert {normalise(text) for text in fact.held_out} <= questions
