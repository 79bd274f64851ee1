"""Chat formats of other people's models: the Jinja templates that come with them.

A template is never rendered with what people wrote. It is rendered with a placeholder for each
message, once for each sequence of roles, and what comes out is cut at the placeholders: there the
messages go in, as text. What the template itself wrote around them may hold control tokens. A
template that leaves messages out or changes them shows when it is rendered with letters of ours,
and is refused; one that looks for certain words in them (as some do for "</think>") is not noticed.

A template is a program of someone else's. It runs in Jinja's sandbox, where it reaches no files and
no Python, and how much it may write and count is bounded; how long it may take is not.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from minimind.errors import TokenizerError

# "start": the beginning of all. "section": after a control token. "middle": going on in a line.
Place = Literal["start", "section", "middle"]

# Around a placeholder stands white space that no template writes: whether it is still there
# afterwards tells whether the template strips messages.
_SPACE = "\u2003"
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ue000([0-9]{{1,9}})\ue001({_SPACE}?)")
_MOST_KEPT = 4096
# What a template may write beside four times the messages, in characters, and count up to.
_MOST_WRITTEN = 1_000_000

# What any filter would change: letters of both cases, digits, quotes, line breaks, a long text.
_LETTERS = string.ascii_letters + string.digits + string.punctuation
_LETTERS += "\n\n  长江 É" + "A long text, " * 400 + "end"


@dataclass(frozen=True)
class Control:
    """A control token: its id, and whether white space before or after it belongs to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Slot:
    """Where a message goes, and which characters the template strips off it; "" is all space."""

    message: int
    left: str | None = None
    right: str | None = None

    def fill(self, text: str) -> str:
        if self.left is not None:
            text = text.lstrip(self.left or None)
        return text if self.right is None else text.rstrip(self.right or None)


@dataclass(frozen=True)
class Run:
    """Text that is encoded in one go: the template's, and messages."""

    parts: tuple[str | Slot, ...]
    place: Place
    answer: int | None  # the message that it is, if that is an answer
    learned: bool  # whether that answer stands after what a prompt for it ends with

    def fill(self, contents: Sequence[str]) -> str:
        return "".join(p if isinstance(p, str) else p.fill(contents[p.message]) for p in self.parts)


@dataclass(frozen=True)
class Mark:
    """A control token of the template."""

    id: int
    answer: int | None  # the message that it ends, if that is an answer
    learned: bool  # as in Run


Layout = tuple[Run | Mark, ...]


@dataclass
class ChatTemplate:
    """A Jinja template. Raises TokenizerError where it is not one.

    names: what the template may write by name, such as `bos_token`. controls: control tokens by
    what they look like in the template.
    """

    source: str
    names: Mapping[str, str]
    controls: Mapping[str, Control]
    _skeletons: dict[tuple[tuple[str, ...], bool], Layout] = field(default_factory=dict)
    _prompt_ends: dict[tuple[str, ...], list[str | Control] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._compiled = _compile(self.source)
        longest_first = sorted(self.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool = False) -> Layout:
        """What the template writes around messages of these roles.

        Raises TokenizerError with the template's own words when it wants other roles, and when it
        leaves a message out or changes it.
        """
        key = roles, add_generation_prompt
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_KEPT:
                self._skeletons.clear()
            parts = list(self._parts(roles, add_generation_prompt))
            self._skeletons[key] = self._cut(parts, roles, self._learned(parts, roles))
        return self._skeletons[key]

    def end_of_answer(self) -> int | None:
        """Id of the control token that ends an answer, if one does."""
        try:
            skeleton = self.skeleton(("user", "assistant"))
        except TokenizerError:  # which whoever chats will be told
            return None
        return next((p.id for p in skeleton if isinstance(p, Mark) and p.answer is not None), None)

    def _render(
        self, roles: tuple[str, ...], contents: Sequence[str], add_generation_prompt: bool
    ) -> str:
        """What the template writes. Raises TokenizerError when it refuses, or writes no end."""
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        most = _MOST_WRITTEN + 4 * sum(map(len, contents))
        written: list[str] = []
        try:
            for piece in self._compiled.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                enable_thinking=False,  # answers are trained and asked for without
                range=_bounded_range(),
                **self.names,
            ):
                written.append(piece)
                most -= len(piece)
                if most < 0:
                    raise OverflowError("it writes without end")
        except Exception as error:  # a template is a program of someone else's
            raise TokenizerError(
                f"the model's chat template refuses messages of {', '.join(roles)}: {error}"
            ) from error
        return "".join(written)

    def _learned(
        self, parts: Sequence[str | Slot | Control], roles: tuple[str, ...]
    ) -> frozenset[int]:
        """The answers before which stands what a prompt for them ends with.

        Not all do: Qwen 3 opens the last answer with empty thoughts, as it does the prompt, and the
        ones before it without. Learned after an opening that no prompt has, those would be of no
        use.
        """
        learned: set[int] = set()
        opening: list[str | Control] = []
        for part in parts:
            if not isinstance(part, Slot):
                opening.append(part)
                continue
            if roles[part.message] == "assistant" and _bare(opening) == self._prompt_end(
                roles[: part.message]
            ):
                learned.add(part.message)
            opening = []
        return frozenset(learned)

    def _prompt_end(self, roles: tuple[str, ...]) -> list[str | Control] | None:
        """What a prompt writes after the last of these messages; None where it refuses them."""
        if roles not in self._prompt_ends:
            if len(self._prompt_ends) >= _MOST_KEPT:
                self._prompt_ends.clear()
            end: list[str | Control] | None = []
            try:
                for part in self._parts(roles, True):
                    end = [] if isinstance(part, Slot) else [*(end or []), part]
            except TokenizerError:
                end = None
            self._prompt_ends[roles] = None if end is None else _bare(end)
        return self._prompt_ends[roles]

    def _cut(
        self,
        rendered: Sequence[str | Slot | Control],
        roles: tuple[str, ...],
        learned: frozenset[int],
    ) -> Layout:
        """Runs and marks; an answer begins a run of its own, since its beginning is a prompt's end.

        To an answer belongs all up to and with the control token that ends it.
        """
        skeleton: list[Run | Mark] = []
        parts: list[str | Slot] = []
        place: Place = "start"
        answer: int | None = None  # whose run it is

        def end_run(*, at_control: bool) -> None:
            nonlocal place
            # Without a control token an answer ends with itself.
            size = len(parts) if at_control or answer is None else 2
            for some, whose in ((parts[:size], answer), (parts[size:], None)):
                if any(some):
                    skeleton.append(Run(tuple(some), place, whose, whose in learned))
                    place = "middle"
            parts.clear()

        for part in rendered:
            if isinstance(part, Control):
                end_run(at_control=True)
                skeleton.append(Mark(part.id, answer, answer in learned))
                place, answer = "section", None
            elif isinstance(part, Slot) and (
                answer is not None or roles[part.message] == "assistant"
            ):
                # A space before an answer is the answer's: prompts end without.
                opening = parts.pop() if parts else ""
                assert isinstance(opening, str), "messages do not touch: each is an answer's end"
                words = opening.rstrip(" ")
                parts.append(words)
                end_run(at_control=False)
                parts = [opening[len(words) :], part]
                answer = part.message if roles[part.message] == "assistant" else None
            else:
                parts.append(part)
        end_run(at_control=False)
        return tuple(skeleton)

    def _parts(
        self, roles: tuple[str, ...], add_generation_prompt: bool
    ) -> Iterator[str | Slot | Control]:
        """What the template writes, and where messages stand in it, stripped in which way."""
        marked = [f"{_SPACE}\ue000{i}\ue001{_SPACE}" for i in range(len(roles))]
        plain, before, after = (
            _PLACEHOLDER.split(self._render(roles, contents, add_generation_prompt))
            for contents in (marked, [f"\n{m}" for m in marked], [f"{m}\n" for m in marked])
        )
        if not len(plain) == len(before) == len(after):
            raise TokenizerError(
                "the model's chat template looks into the messages; it cannot be used"
            )
        pieces: list[str | Slot] = [plain[0]]
        for at in range(1, len(plain), 4):
            left, number, right, text = plain[at : at + 4]
            slot = Slot(
                int(number),
                "" if not left else "\n" if before[at - 1] == plain[at - 1] else None,
                "" if not right else "\n" if after[at + 3] == text else None,
            )
            pieces += [slot, text]
        self._check(pieces, roles, add_generation_prompt)
        for piece in pieces:
            yield from self._split(piece) if isinstance(piece, str) else [piece]

    def _check(
        self, pieces: Sequence[str | Slot], roles: tuple[str, ...], add_generation_prompt: bool
    ) -> None:
        """Raise TokenizerError unless all messages are there, and as they were but for the ends."""
        placed = {piece.message for piece in pieces if isinstance(piece, Slot)}
        for number, role in enumerate(roles):
            if number not in placed:
                raise TokenizerError(
                    f"the model's chat template leaves out message {number + 1} of "
                    f"{', '.join(roles)}, which is of the role {role}, or does not take it as text"
                )
        letters = [f"Message {number} {_LETTERS}" for number in range(len(roles))]
        for contents in (letters, [f" \n {text} \n " for text in letters]):
            written = self._render(roles, contents, add_generation_prompt)
            if placed > set(range(len(roles))) or written != "".join(
                piece if isinstance(piece, str) else piece.fill(contents[piece.message])
                for piece in pieces
            ):
                raise TokenizerError(
                    "the model's chat template does not write messages as they are: it shortens or "
                    "changes them; it cannot be used"
                )

    def _split(self, text: str) -> Iterator[str | Control]:
        """The template's own text and control tokens."""
        at, strips = 0, False
        for found in self._control.finditer(text):
            control = self.controls[found[0]]
            between = text[at : found.start()]
            between = between.lstrip() if strips else between
            yield between.rstrip() if control.lstrip else between
            yield control
            at, strips = found.end(), control.rstrip
        yield text[at:].lstrip() if strips else text[at:]


def _bare(opening: Sequence[str | Control]) -> list[str | Control]:
    """Without the space at its end, which belongs to the answer."""
    *others, last = opening
    assert isinstance(last, str), "text stands after each control token, if empty"
    return [*others, last.rstrip(" ")]


def _bounded_range() -> Callable[..., range]:
    """`range` for one rendering, which all in all counts up to _MOST_WRITTEN."""
    left = _MOST_WRITTEN

    def bounded(*bounds: int) -> range:
        nonlocal left
        numbers = range(*bounds)
        left -= min(len(numbers), left + 1)
        if left < 0:
            raise OverflowError("it counts without end")
        return numbers

    return bounded


def _compile(source: str) -> Any:
    """As transformers does: sandboxed, with the same filters, functions and white space."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                texts = [len(side) for side in (left, right) if hasattr(side, "__len__")]
                times = [side for side in (left, right) if isinstance(side, int)]
                if texts and times and texts[0] * times[0] > _MOST_WRITTEN:
                    raise OverflowError("it repeats a text too often")
            elif max(abs(left), abs(right)) > 1000:
                raise OverflowError("its numbers are too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    now = datetime.now()  # the same for all that is rendered, so that it can be compared
    environment.globals["strftime_now"] = now.strftime
    # A tag that marks answers for transformers alone.
    plain = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    plain = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", plain)
    try:
        return environment.from_string(plain)
    except Exception as error:  # Python's own too: what Jinja makes of it is compiled
        raise TokenizerError(f"the model's chat template cannot be read: {error}") from error
