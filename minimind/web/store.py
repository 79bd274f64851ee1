"""Conversations on the user's own disk, one JSON file each."""

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

from minimind.paths import data_folder

_NAME = re.compile(r"[0-9a-f]{32}")
_ASIDE = ".broken"
_TITLE_LENGTH = 40
_CHECKS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass
class Answer:
    """What one model said to a question."""

    __pydantic_config__ = _CHECKS

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

    __pydantic_config__ = _CHECKS

    question: str
    answers: list[Answer] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Conversation:
    """Everything that makes up a conversation."""

    __pydantic_config__ = _CHECKS

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    updated: float = field(default_factory=time.time)
    system: str = ""
    models: list[str] = field(default_factory=list)
    settings: dict[str, int | float | None] = field(default_factory=dict)
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

    def as_training_data(self) -> str:
        """Lines of JSON that `minimind sft` reads: one for each model that was talked with side by
        side. Nothing where nothing was answered.
        """
        sides = range(max((len(turn.answers) for turn in self.turns), default=0))
        talks = [talk for side in sides if (talk := self._answered(len(self.turns), side))]
        lines = [{"conversations": [*self._system(), *talk]} for talk in talks]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

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


_CONVERSATION = TypeAdapter(Conversation)


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
        # The time of the file is what conversations are listed by.
        os.utime(part, ns=(int(conversation.updated * 1e9),) * 2)
        os.replace(part, path)

    def load(self, id: str) -> Conversation | None:
        """None for one that is not there, or that cannot be read: it is put aside then."""
        if not _NAME.fullmatch(id):
            return None
        path = self._path(id)
        try:
            found = _CONVERSATION.validate_json(path.read_bytes())
        except OSError:
            return None
        except ValidationError:
            found = None
        # By one id two turns would be one on the page, and by another id it would be another file.
        if found and found.id == id and len({turn.id for turn in found.turns}) == len(found.turns):
            return found
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(f".{uuid.uuid4().hex[:8]}{_ASIDE}"))
        return None

    def put_aside(self) -> list[Path]:
        """The files that could not be read, which their owner may mend or remove."""
        return sorted(self._folder.glob(f"*{_ASIDE}"))

    def delete(self, id: str) -> None:
        """Remove it; no harm if it is not there."""
        if _NAME.fullmatch(id):
            self._path(id).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        """Ids of the saved conversations, the last used first; no file is read."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            found = [
                (entry.stat().st_mtime_ns, Path(entry.name).stem)
                for entry in entries
                if entry.name.endswith(".json") and _NAME.fullmatch(Path(entry.name).stem)
            ]
            return [id for _, id in sorted(found, reverse=True)]
        return []

    def title(self, id: str) -> str | None:
        """Title of a conversation, read again only after its file has changed.

        None for one that `load` does not find.
        """
        try:
            written = self._path(id).stat().st_mtime_ns
        except OSError:
            return None
        return _title(self._folder, id, written)

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"


@lru_cache(maxsize=1024)
def _title(folder: Path, id: str, written: int) -> str | None:
    found = Store(folder).load(id)
    return found.title if found else None
