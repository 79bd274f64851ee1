"""Texts of the page in English and Chinese."""

from typing import Literal

Language = Literal["en", "zh"]

_TEXTS: dict[str, tuple[str, str]] = {
    "new": ("New conversation", "新对话"),
    "empty": ("What would you like to talk about?", "想聊点什么？"),
    "message": ("Send a message", "输入消息"),
    "model": ("Model", "模型"),
    "second model": ("Second model", "第二个模型"),
    "side by side": ("Compare two models", "对比两个模型"),
    "system": ("System prompt", "系统提示词"),
    "system hint": (
        "For example: You are a helpful assistant.",
        "例如：你是一个乐于助人的助手。",
    ),
    "sampling": ("Sampling", "采样参数"),
    "temperature": ("Temperature", "温度"),
    "temperature hint": (
        "0 is greedy decoding; higher values are more varied",
        "0 为贪心解码；值越大，回答越多样",
    ),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0 = off)", "Top-k（0 = 不限制）"),
    "min_p": ("Min-p", "Min-p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_tokens": ("Maximum answer tokens (-1 = no limit)", "回答的最大词元数（-1 = 不限）"),
    "seed": ("Seed (empty = random)", "随机种子（留空 = 随机）"),
    "conversations": ("Conversations", "对话记录"),
    "delete": ("Delete this conversation", "删除此对话"),
    "export": ("Export as training data (JSONL)", "导出为训练数据（JSONL）"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "edit": ("Edit", "编辑"),
    "copy": ("Copy", "复制"),
    "send": ("Send", "发送"),
    "cancel": ("Cancel", "取消"),
    "tokens": ("tokens", "词元"),
    "tokens/s": ("tokens/s", "词元/秒"),
    "stopped": ("stopped", "已停止"),
    "length": ("token limit reached", "已达词元上限"),
    "left out": (
        "The conversation exceeds the model's context: the oldest messages were left out.",
        "对话超出了模型的上下文长度，最早的消息已略去。",
    ),
    "unreadable": (
        "A conversation could not be read. Its file was kept as:",
        "有一个对话无法读取，其文件保留在：",
    ),
    "no token": (
        "This page is for the user who started it. Open the address that `minimind web` printed in "
        "the terminal: it ends in `?token=…`.",
        "只有启动本页面的用户才能使用它。请打开 `minimind web` 在终端中显示的地址，"
        "它以 `?token=…` 结尾。",
    ),
    "more": ("Show more", "显示更多"),
    "no models": ("The service has no models.", "该服务没有可用的模型。"),
    "retry": ("Try again", "重试"),
}


def language_of(locale: str | None) -> Language:
    """Return the language for a browser's locale, such as zh-CN."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"


def text(language: Language, key: str) -> str:
    """Return a text of the page."""
    return _TEXTS[key][language == "zh"]
