"""Conversations on the user's own disk, one JSON file each."""

import json
import os
import re
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[0-9a-f]{32}")
_TITLE_LENGTH = 40


@dataclass
class Answer:
    """What one model said to a question."""

    model: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # from the question to its last piece
    finish_reason: str | None = None  # None: broken off
    left_out: int = 0  # messages that no longer fitted into the context
    error: str | None = None


@dataclass
class Turn:
    """A question and its answers: one, or one of each model side by side."""

    question: str
    answers: list[Answer] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Conversation:
    """Everything that makes up a conversation."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    updated: float = field(default_factory=time.time)
    system: str = ""
    models: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The beginning of its first question."""
        first = " ".join(self.turns[0].question.split()) if self.turns else ""
        return first if len(first) <= _TITLE_LENGTH else f"{first[: _TITLE_LENGTH - 1]}…"

    def messages(self, turn: int, side: int) -> list[dict[str, str]]:
        """What the model on that side is asked in that turn: all that it has heard and said."""
        asked = {"role": "user", "content": self.turns[turn].question}
        return [*self._system(), *self._answered(turn, side), asked]

    def as_training_data(self, side: int = 0) -> str:
        """A line of JSON that `minimind sft` reads; nothing where nothing was answered."""
        answered = self._answered(len(self.turns), side)
        if not answered:
            return ""
        messages = [*self._system(), *answered]
        return json.dumps({"conversations": messages}, ensure_ascii=False) + "\n"

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _answered(self, turns: int, side: int) -> list[dict[str, str]]:
        """Of the first `turns`, the questions that have an answer on that side, and the answers."""
        found = []
        for turn in self.turns[:turns]:
            said = turn.answers[min(side, len(turn.answers) - 1)] if turn.answers else None
            if said is not None and said.text:
                found.append({"role": "user", "content": turn.question})
                found.append({"role": "assistant", "content": said.text})
        return found


class Store:
    """The conversations in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or data_folder() / "conversations"

    def save(self, conversation: Conversation) -> None:
        """Write it, whole or not at all."""
        conversation.updated = time.time()
        # Nobody else on this machine needs to read what is said here.
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(conversation.id)
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        text = json.dumps(asdict(conversation), ensure_ascii=False, indent=1)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        os.replace(part, path)

    def load(self, id: str) -> Conversation | None:
        """None for one that is not there, or that cannot be read."""
        if not _NAME.fullmatch(id):
            return None
        try:
            found = json.loads(self._path(id).read_text("utf-8"))
            turns = [
                Turn(t["question"], [Answer(**a) for a in t["answers"]], t["id"])
                for t in found.pop("turns")
            ]
            return Conversation(**found, turns=turns)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def delete(self, id: str) -> None:
        """Remove it; no harm if it is not there."""
        if _NAME.fullmatch(id):
            self._path(id).unlink(missing_ok=True)

    def all(self) -> list[Conversation]:
        """Those that can be read, the last used first."""
        names = [path.stem for path in self._folder.glob("*.json")]
        found = [conversation for name in names if (conversation := self.load(name))]
        return sorted(found, key=lambda conversation: conversation.updated, reverse=True)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"


def data_folder() -> Path:
    """Where programs of this user keep their data."""
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        place = "~/Library/Application Support"
    else:
        place = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(place).expanduser() / "minimind"
