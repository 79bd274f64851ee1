"""What the page says, in English and in Chinese."""

from typing import Literal

Language = Literal["en", "zh"]

_WORDS: dict[str, tuple[str, str]] = {
    "new": ("New conversation", "新对话"),
    "empty": ("What would you like to talk about?", "想聊点什么？"),
    "say": ("Say something", "说点什么"),
    "model": ("Model", "模型"),
    "second model": ("Second model", "第二个模型"),
    "side by side": ("Two models side by side", "两个模型并排回答"),
    "system": ("System prompt", "系统提示词"),
    "system hint": ("What the model is told before all else", "对话开始前告诉模型的话"),
    "sampling": ("Sampling", "采样设置"),
    "temperature": ("Temperature", "温度"),
    "temperature hint": (
        "0 always takes the likeliest word; higher is more varied",
        "0 总是选最可能的词；越高越多样",
    ),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0 = all)", "Top-k（0 = 全部）"),
    "min_p": ("Min-p", "Min-p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_tokens": ("Longest answer, in tokens (-1 = no limit)", "回答最长词元数（-1 = 不限）"),
    "seed": ("Seed (empty = by chance)", "随机种子（空 = 随机）"),
    "conversations": ("Conversations", "对话记录"),
    "delete": ("Delete this conversation", "删除这个对话"),
    "export": ("Export for training (JSONL)", "导出为训练数据（JSONL）"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "edit": ("Edit", "编辑"),
    "copy": ("Copy", "复制"),
    "send": ("Send", "发送"),
    "cancel": ("Cancel", "取消"),
    "tokens": ("tokens", "词元"),
    "tokens/s": ("tokens/s", "词元/秒"),
    "stopped": ("stopped", "已停止"),
    "length": ("cut at its longest", "达到长度上限"),
    "left out": (
        "The oldest messages are left out: the conversation is longer than the model can see.",
        "对话超过了模型能看到的长度，最早的消息已省略。",
    ),
    "put aside": (
        "A conversation could not be read. Its file is kept as it is:",
        "有一个对话无法读取，它的文件原样保留在：",
    ),
    "no token": (
        "This page is for the user who started it. Open the address that `minimind web` printed in "
        "the terminal: it ends in `?token=…`.",
        "这个页面只供启动它的用户使用。请打开 `minimind web` 在终端里给出的地址，"
        "它以 `?token=…` 结尾。",
    ),
    "more": ("Show more", "显示更多"),
    "no models": ("The service has no models.", "服务里没有模型。"),
    "again": ("Try again", "重试"),
}


def language_of(locale: str | None) -> Language:
    """The language of a browser that names its locale, such as zh-CN."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"


def word(language: Language, key: str) -> str:
    """One of the phrases above."""
    return _WORDS[key][language == "zh"]
