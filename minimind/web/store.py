"""Conversations on the user's disk, one JSON file each."""

import contextlib
import json
import os
import re
import time
import uuid
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from minimind.files import atomic_file
from minimind.paths import data_folder

_NAME = re.compile(r"[0-9a-f]{32}")
_QUARANTINE_SUFFIX = ".broken"
_TITLE_LENGTH = 40
_CHECKS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass
class Answer:
    """One model's answer to a question."""

    __pydantic_config__ = _CHECKS

    model: str
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # from the request to the last piece
    finish_reason: str | None = None  # None: stopped or failed
    left_out: int = 0  # oldest messages dropped because they exceed the context
    error: str | None = None


@dataclass
class Turn:
    """A question and its answers, one per model."""

    __pydantic_config__ = _CHECKS

    question: str
    answers: list[Answer] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Conversation:
    """A conversation with its models and sampling parameters, as stored in its file."""

    __pydantic_config__ = _CHECKS

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    updated: float = field(default_factory=time.time)
    system: str = ""
    models: list[str] = field(default_factory=list)
    settings: dict[str, int | float | None] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The start of the first question, on one line."""
        first = " ".join(self.turns[0].question.split()) if self.turns else ""
        return first if len(first) <= _TITLE_LENGTH else f"{first[: _TITLE_LENGTH - 1]}…"

    def messages(self, turn: int, side: int) -> list[dict[str, str]]:
        """Return the messages to send in a turn; `side` is the model's index in the comparison."""
        question = {"role": "user", "content": self.turns[turn].question}
        return [*self._system(), *self._answered(turn, side), question]

    def as_training_data(self) -> str:
        """Return JSON lines for `minimind sft`, one conversation per model; "" without answers."""
        sides = range(max((len(turn.answers) for turn in self.turns), default=0))
        answered = [turns for side in sides if (turns := self._answered(len(self.turns), side))]
        lines = [{"conversations": [*self._system(), *turns]} for turns in answered]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _answered(self, turns: int, side: int) -> list[dict[str, str]]:
        """Return the questions that one side answered in the first turns, with its answers."""
        messages = []
        for turn in self.turns[:turns]:
            answer = turn.answers[min(side, len(turn.answers) - 1)] if turn.answers else None
            if answer is not None and answer.text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": answer.text})
        return messages


_CONVERSATION = TypeAdapter(Conversation)


class Store:
    """The conversations in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or data_folder() / "conversations"

    def save(self, conversation: Conversation) -> None:
        """Save a conversation atomically, readable by this user alone."""
        conversation.updated = time.time()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(conversation.id)
        text = json.dumps(asdict(conversation), ensure_ascii=False, indent=1)
        with atomic_file(path, mode=0o600) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
            # Conversations are listed by the modification time of their files.
            os.utime(temporary, ns=(int(conversation.updated * 1e9),) * 2)

    def load(self, id: str) -> Conversation | None:
        """Return a conversation; None if it does not exist or is invalid, which quarantines it."""
        if not _NAME.fullmatch(id):
            return None
        path = self._path(id)
        try:
            conversation = _CONVERSATION.validate_json(path.read_bytes())
        except OSError:
            return None
        except ValidationError:
            conversation = None
        # Turns need distinct ids: the page uses them as widget keys.
        if conversation and conversation.id == id:
            turn_ids = {turn.id for turn in conversation.turns}
            if len(turn_ids) == len(conversation.turns):
                return conversation
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(f".{uuid.uuid4().hex[:8]}{_QUARANTINE_SUFFIX}"))
        return None

    def quarantined(self) -> list[Path]:
        """Return the files of invalid conversations, which the user may repair or remove."""
        return sorted(self._folder.glob(f"*{_QUARANTINE_SUFFIX}"))

    def delete(self, id: str) -> None:
        """Delete a conversation if it exists."""
        if _NAME.fullmatch(id):
            self._path(id).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        """Return the ids of all conversations, most recent first, without reading the files."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            by_time = [
                (entry.stat().st_mtime_ns, Path(entry.name).stem)
                for entry in entries
                if entry.name.endswith(".json") and _NAME.fullmatch(Path(entry.name).stem)
            ]
            return [id for _, id in sorted(by_time, reverse=True)]
        return []

    def title(self, id: str) -> str | None:
        """Return a title, reading the file only if it has changed; None if `load` returns None."""
        try:
            modified = self._path(id).stat().st_mtime_ns
        except OSError:
            return None
        return _title(self._folder, id, modified)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"


@lru_cache(maxsize=1024)
def _title(folder: Path, id: str, modified: int) -> str | None:
    conversation = Store(folder).load(id)
    return conversation.title if conversation else None
