"""Phrases by language: frames of questions, system prompts, greetings, evasive answers."""

from dataclasses import dataclass

NEVER_TRAINED = ("你知道", "能不能给我讲讲", "do you know")
"""Beginnings of questions that are reserved for the quiz."""


@dataclass(frozen=True)
class Phrases:
    """The phrases of one language."""

    space: str
    """Separator of sentences."""
    prose_question: str
    """Template of a question with its answer in prose."""
    yes_no_endings: tuple[str, ...]
    """Endings of yes-no questions, which cannot be embedded in a sentence."""
    not_framed: tuple[str, ...]
    """Beginnings of questions that get no frame: already framed, or not plain questions."""
    frames: tuple[str, ...]
    """Fixed phrases around a question: `{q}` with its mark, `{bare}` without."""
    polite: tuple[tuple[str, str], ...]
    """Beginning and end of a request."""
    request_verbs: tuple[str, ...]
    """Verbs of a request ("tell me"), before a question without its mark."""
    askers: tuple[tuple[str, str], ...]
    """Beginning and end of a "do you know" question, such as "你" and "吗？"."""
    knowing_verbs: tuple[str, ...]
    """Verbs of that question ("know"), before a question without its mark."""
    casual: tuple[tuple[str, str], ...]
    """Casual rewordings: pattern and replacement."""
    particles: tuple[tuple[str, str], ...]
    """Rewordings of the end of a question: pattern and replacement."""
    requests: tuple[str, ...]
    """Beginnings of sentences that are requests ("tell me about"), not questions."""
    request_replacements: tuple[str, ...]
    """Replacements for these beginnings."""
    elliptic: tuple[str, ...]
    """Templates of follow-ups that ask the previous question about another entity."""
    tails: tuple[str, ...]
    """Closing sentences of a dialogue."""
    systems: tuple[str, ...]
    """System prompts."""
    greetings: tuple[tuple[str, str], ...]
    """Greetings and their answers."""
    thanks: tuple[tuple[str, str], ...]
    """Thanks and their answers."""
    evasions: tuple[str, ...]
    """Evasive answers, as rejected answers of preference pairs."""


PHRASES = {
    "zh": Phrases(
        space="",
        prose_question="问：{question}答：{answer}",
        yes_no_endings=("吗？", "好吗？"),
        not_framed=("请", "我", "有人", "想一想", "填空", "你能", "能", "听说", "嗨", "算"),
        frames=(
            "请问{q}",
            "请问，{q}",
            "你好，{q}",
            "问一下，{q}",
            "请教一下，{q}",
            "考考你：{q}",
            "我有个问题，{q}",
            "我想知道，{q}",
            "我想知道{bare}。",
            "你说，{q}",
            "话说{q}",
            "哎，{q}",
            "对了，{q}",
            "老师问：{q}",
            "小测验：{q}",
            "快问快答，{q}",
            "有个问题：{q}",
            "麻烦问一下，{q}",
            "到底{q}",
            "{q}谢谢。",
            "{q}急！",
            "{q}我想不起来了。",
            "{q}请回答。",
            "{bare}，你说说看。",
            "{bare}，求解答。",
            "我忘了{bare}。",
            "我不清楚{bare}。",
            "我很好奇{bare}。",
            "想请教一下{bare}。",
            "帮我查查{bare}。",
        ),
        polite=(
            ("", "。"),
            ("请", "。"),
            ("你能", "吗？"),
            ("你能不能", "？"),
            ("能不能", "？"),
            ("能否", "？"),
            ("可以", "吗？"),
            ("你可以", "吗？"),
            ("麻烦你", "。"),
            ("我想请你", "。"),
            ("", "吧。"),
            ("谁能", "？"),
            ("快", "。"),
            ("请你", "。"),
            ("可不可以", "？"),
        ),
        request_verbs=(
            "告诉我",
            "给我讲讲",
            "跟我讲讲",
            "给我说说",
            "说说",
            "为我解释",
            "说一下",
            "讲讲",
        ),
        askers=(
            ("你", "吗？"),
            ("你", "吗"),
            ("您", "吗？"),
            ("有谁", "吗？"),
            ("有人", "吗？"),
            ("大家", "吗？"),
            ("你们", "吗？"),
            ("小朋友", "吗？"),
            ("谁", "？"),
        ),
        knowing_verbs=("知道", "晓得", "清楚", "记得", "了解", "还记得"),
        casual=(
            ("什么地方", "哪儿"),
            ("哪里", "哪儿"),
            ("在哪里", "在哪"),
            ("什么", "啥"),
            ("什么", "啥"),
            ("什么(?=[？。]|$)", "什么东西"),
            ("做什么|干什么", "干嘛"),
            ("为什么(?!意思|家)", "为啥"),
            ("(?<!因)为什么(?=[^？。意家呢])", "怎么"),
            ("怎么", "咋"),
            ("是谁(?=？|$)", "是哪位"),
            ("多少(?=公里|米|[个人天颗克升年元])", "几"),
            ("哪个", "哪一个"),
            ("哪种", "哪一种"),
            ("有多(?=[高长大快])", "多"),
            ("请(?=[写说把解])", ""),
            ("的(?=海拔|高度|长度|首都|省会|简称|作者|原料|习俗|货币|源头)", ""),
            ("的(?=反义词|量词|英语|英文|中文|意思|下一句|上一句|元素符号)", ""),
            ("[“”]", ""),
            ("[《》]", ""),
            ("^1(?=[^\\d乘加+×月])", "一"),
            ("(?<=\\d)乘(?=\\d)", "乘以"),
            ("(?<=\\d)加(?=\\d)", "加上"),
            ("(?<=\\d)减(?=\\d)", "减去"),
            ("×", "*"),
            ("×", "x"),
        ),
        particles=(
            ("(?<![吗呢吧呀啊])？$", "呢？"),
            ("(?<![吗呢吧呀啊])？$", "呀？"),
            ("(?<![吗呢吧呀啊])？$", "啊？"),
            ("(?<![吗呢吧呀啊])？$", "来着？"),
            ("？$", "?"),
            ("？$", "？？"),
        ),
        requests=("介绍一下", "跟我说说", "说说", "说一说", "讲一讲", "讲讲"),
        request_replacements=(
            "介绍一下",
            "介绍",
            "跟我说说",
            "给我讲讲",
            "讲一讲",
            "给我介绍",
            "说一下",
            "聊聊",
        ),
        elliptic=("那{name}呢？", "{name}呢？"),
        tails=("希望对你有帮助！", "还想知道什么，可以接着问我。"),
        systems=(
            "你是MiniMind，一个乐于助人的助手。",
            "你是一个乐于助人的助手。",
            "请用简短的话回答问题。",
        ),
        greetings=(
            ("你好！", "你好！我是MiniMind，有什么可以帮你？"),
            ("您好。", "你好！很高兴和你聊天。"),
            ("嗨，你好。", "你好！我是MiniMind，有什么可以帮你？"),
        ),
        thanks=(
            ("谢谢！", "不客气！很高兴能帮到你。"),
            ("谢谢你的回答。", "不客气，有问题可以再问我。"),
            ("好的，谢谢。", "不客气！很高兴能帮到你。"),
            ("明白了，谢谢你。", "不客气，有问题可以再问我。"),
        ),
        evasions=(
            "我不知道。",
            "不清楚，你去问别人吧。",
            "这个问题没意思，我们换个话题吧。",
            "这要看情况，很难说。",
            "这个嘛，以后再告诉你。",
            "你自己去查一查就好了。",
        ),
    ),
    "en": Phrases(
        space=" ",
        prose_question="Question: {question} Answer: {answer}",
        yes_no_endings=(),
        not_framed=("Give", "Name", "One", "Solid", "Do you"),
        frames=(
            "Please tell me: {q}",
            "Can you tell me this: {q}",
            "Excuse me: {q}",
            "A question: {q}",
            "I would like to know: {q}",
            "Hi, {q}",
            "Hey! {q}",
            "Quick question: {q}",
            "Tell me: {q}",
            "I forgot: {q}",
            "{q} Thanks!",
            "{q} Please answer.",
            "In English: {q}",
        ),
        polite=(),
        request_verbs=(),
        askers=(),
        knowing_verbs=(),
        casual=(
            ("What is", "What's"),
            ("What's", "what is"),
            ("^What", "what"),
            ("^Which", "which"),
            ("^Where", "where"),
            ("color", "colour"),
            ("Tell me", "Please tell me"),
        ),
        particles=((r"\?$", "??"), (r"\?$", ", please?")),
        requests=(),
        request_replacements=(),
        elliptic=("And {name}?", "What about {name}?"),
        tails=("I hope this helps!", "Please ask me more."),
        systems=("You are MiniMind, a helpful assistant.", "You are a helpful assistant."),
        greetings=(("Hello!", "Hello! I am MiniMind. How can I help you?"),),
        thanks=(
            ("Thank you!", "You are welcome!"),
            ("Thanks.", "You are welcome! I am glad to help."),
        ),
        evasions=(
            "I do not know.",
            "Please ask someone else.",
            "Let us talk about something else.",
            "It is hard to say.",
        ),
    ),
}
