"""Chat formats of other people's models: the Jinja templates that come with them.

A template is never rendered with what people wrote. It is rendered with a placeholder for each
message, once for each sequence of roles, and what comes out is cut at the placeholders: there the
messages go in, as text. What the template itself wrote around them may hold control tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from minimind.errors import TokenizerError

# "start": the beginning of all. "section": after a control token. "middle": going on in a line.
Place = Literal["start", "section", "middle"]

# Around a placeholder stands white space that no template writes: whether it is still there
# afterwards tells whether the template strips messages.
_SPACE = "\u2003"
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)")
_MOST_KEPT = 4096


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

    def fill(self, contents: Sequence[str]) -> str:
        return "".join(p if isinstance(p, str) else p.fill(contents[p.message]) for p in self.parts)


@dataclass(frozen=True)
class Mark:
    """A control token of the template."""

    id: int
    answer: int | None  # the message that it ends, if that is an answer


Skeleton = tuple[Run | Mark, ...]


@dataclass
class ChatTemplate:
    """A Jinja template. Raises TokenizerError where it is not one.

    names: what the template may write by name, such as `bos_token`. controls: control tokens by
    what they look like in the template.
    """

    source: str
    names: Mapping[str, str]
    controls: Mapping[str, Control]
    _skeletons: dict[tuple[tuple[str, ...], bool], Skeleton] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._compiled = _compile(self.source)
        longest_first = sorted(self.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool = False) -> Skeleton:
        """What the template writes around messages of these roles.

        Raises TokenizerError with the template's own words when it wants other roles.
        """
        key = roles, add_generation_prompt
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_KEPT:
                self._skeletons.clear()
            self._skeletons[key] = self._cut(self._parts(roles, add_generation_prompt), roles)
        return self._skeletons[key]

    def end_of_answer(self) -> int | None:
        """Id of the control token that ends an answer, if one does."""
        try:
            skeleton = self.skeleton(("user", "assistant"))
        except TokenizerError:  # which whoever chats will be told
            return None
        return next((p.id for p in skeleton if isinstance(p, Mark) and p.answer is not None), None)

    def _render(
        self, roles: tuple[str, ...], add_generation_prompt: bool, left: str = "", right: str = ""
    ) -> list[str]:
        """[text, space, number, space, text, …, text]: what stands around the placeholders.

        left, right: what messages begin and end with, apart from the space.
        """
        messages = [
            {"role": role, "content": f"{left}{_SPACE}\ue000{i}\ue001{_SPACE}{right}"}
            for i, role in enumerate(roles)
        ]
        try:
            text: str = self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                enable_thinking=False,  # answers are trained and asked for without
                **self.names,
            )
        except Exception as error:  # a template is a program of someone else's
            raise TokenizerError(
                f"the model's chat template refuses messages of {', '.join(roles)}: {error}"
            ) from error
        return _PLACEHOLDER.split(text)

    def _cut(self, rendered: Iterator[str | Slot | Control], roles: tuple[str, ...]) -> Skeleton:
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
                    skeleton.append(Run(tuple(some), place, whose))
                    place = "middle"
            parts.clear()

        for part in rendered:
            if isinstance(part, Control):
                end_run(at_control=True)
                skeleton.append(Mark(part.id, answer))
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
        plain = self._render(roles, add_generation_prompt)
        before = self._render(roles, add_generation_prompt, left="\n")
        after = self._render(roles, add_generation_prompt, right="\n")
        if not len(plain) == len(before) == len(after):
            raise TokenizerError(
                "the model's chat template looks into the messages; it cannot be used"
            )
        yield from self._split(plain[0])
        for at in range(1, len(plain), 4):
            left, number, right, text = plain[at : at + 4]
            yield Slot(
                int(number),
                "" if not left else "\n" if before[at - 1] == plain[at - 1] else None,
                "" if not right else "\n" if after[at + 3] == text else None,
            )
            yield from self._split(text)

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


def _compile(source: str) -> Any:
    """As transformers does: sandboxed, with the same filters, functions and white space."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    # A tag that marks answers for transformers alone.
    plain = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    plain = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", plain)
    try:
        return environment.from_string(plain)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"the model's chat template cannot be read: {error}") from error
