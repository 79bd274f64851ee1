"""Chat templates of third-party models: Jinja programs that come with them.

A template is never rendered with the contents of messages. It is rendered once per sequence of
roles, with a placeholder for each message. The result is split at the placeholders; the messages
are inserted there as text, and only the template's own text can contain control tokens. A template
that omits or changes messages is detected by rendering it with known text, and rejected. A template
that depends on certain words in a message (some do on "</think>") is not detected.

A template is untrusted code. It runs in Jinja's sandbox, without access to files or Python. The
length of its output and of its loops is limited; its run time is not.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from minimind.errors import TokenizerError
from minimind.tokenizer.format import ASSISTANT

# "start": at the beginning of the conversation. "after_control": after a control token. "inline":
# continues a line.
TextPosition = Literal["start", "after_control", "inline"]

# Placeholders are surrounded by a kind of white space that no template writes. If it is missing in
# the result, the template strips messages.
_SPACE = "\u2003"
_PLACEHOLDER = re.compile(f"({_SPACE}?)\ue000([0-9]{{1,9}})\ue001({_SPACE}?)")
_MAX_CACHED_MESSAGES = 65_536  # of cached layouts together, which take about 50 MB
_MAX_CACHED_PROMPTS = 4096
# Limit on the output of a template, in characters beyond four times the length of the messages, and
# on the total length of its ranges.
_MAX_OUTPUT = 1_000_000

# Text that any filter would change: mixed case, digits, quotes, line breaks, 5,000 characters.
_PROBE_TEXT = string.ascii_letters + string.digits + string.punctuation
_PROBE_TEXT += "\n\n  长江 É" + "A long text, " * 400 + "end"


@dataclass(frozen=True)
class SpecialToken:
    """A control token. lstrip, rstrip: it absorbs the white space to its left or right."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Placeholder:
    """Position of a message, and what the template strips from it.

    left, right: characters stripped on that side, "" for all white space, None for nothing.
    """

    message: int
    left: str | None = None
    right: str | None = None

    def strip(self, text: str) -> str:
        """Strip a message as the template does."""
        if self.left is not None:
            text = text.lstrip(self.left or None)
        return text if self.right is None else text.rstrip(self.right or None)


@dataclass(frozen=True)
class TextSegment:
    """Text that is encoded in one piece: text of the template and placeholders of messages."""

    parts: tuple[str | Placeholder, ...]
    position: TextPosition
    answer: int | None  # index of the message, if the segment is an answer
    is_supervised: bool  # the answer follows the generation prompt

    def render(self, contents: Sequence[str]) -> str:
        """Insert the contents of the messages."""
        return "".join(
            part if isinstance(part, str) else part.strip(contents[part.message])
            for part in self.parts
        )


@dataclass(frozen=True)
class ControlToken:
    """A control token that the template writes."""

    id: int
    answer: int | None  # index of the message that it ends, if that is an answer
    is_supervised: bool  # as in TextSegment


Layout = tuple[TextSegment | ControlToken, ...]


@dataclass
class ChatTemplate:
    """A Jinja chat template. Raises TokenizerError if it cannot be compiled.

    variables: values that the template refers to by name, such as `bos_token`. special_tokens: the
    control tokens, by the text with which the template writes them.
    """

    source: str
    variables: Mapping[str, str]
    special_tokens: Mapping[str, SpecialToken]
    _layouts: dict[tuple[tuple[str, ...], bool], Layout] = field(default_factory=dict)
    _generation_prompts: dict[tuple[str, ...], list[str | SpecialToken] | None] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self._compiled = _compile(self.source)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def layout(self, roles: tuple[str, ...], add_generation_prompt: bool = False) -> Layout:
        """Return what the template writes for messages of these roles.

        With `add_generation_prompt` no answer is supervised: such a layout is a prompt.

        Raises TokenizerError, with the template's own message, if it rejects these roles, and if
        it omits or changes a message.
        """
        key = roles, add_generation_prompt
        layout = self._layouts.get(key)
        if layout is None:
            parts = list(self._parse(roles, add_generation_prompt))
            supervised: frozenset[int] = frozenset()
            if not add_generation_prompt:  # costs a rendering per answer
                supervised = self._supervised_answers(parts, roles)
            layout = _to_layout(parts, roles, supervised)
            # A list, because another thread may add a layout meanwhile.
            num_cached = sum(len(cached) for cached, _ in list(self._layouts))
            if num_cached + len(roles) > _MAX_CACHED_MESSAGES:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    def end_of_answer(self) -> int | None:
        """Return the id of the control token that ends an answer, if there is one."""
        try:
            layout = self.layout(("user", ASSISTANT))
        except TokenizerError:  # reported by the first chat
            return None
        return next(
            (p.id for p in layout if isinstance(p, ControlToken) and p.answer is not None), None
        )

    def _render(
        self, roles: tuple[str, ...], contents: Sequence[str], add_generation_prompt: bool
    ) -> str:
        """Render the template. Raises TokenizerError when it fails or writes too much."""
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        budget = _MAX_OUTPUT + 4 * sum(map(len, contents))
        written: list[str] = []
        try:
            for piece in self._compiled.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                enable_thinking=False,  # in training and generation
                range=_bounded_range(),
                **self.variables,
            ):
                written.append(piece)
                budget -= len(piece)
                if budget < 0:
                    raise OverflowError("its output is too long")
        except Exception as error:  # untrusted code can raise anything
            raise TokenizerError(
                f"the model's chat template rejects the roles {', '.join(roles)}: {error}"
            ) from error
        return "".join(written)

    def _supervised_answers(
        self, parts: Sequence[str | Placeholder | SpecialToken], roles: tuple[str, ...]
    ) -> frozenset[int]:
        """Return the indices of answers that follow the generation prompt.

        Qwen 3, for example, writes an empty <think> block before the last answer, as in the
        generation prompt, but none before earlier answers. No prompt ends like the text before
        these, so training on them would be useless.
        """
        supervised: set[int] = set()
        opening: list[str | SpecialToken] = []
        for part in parts:
            if not isinstance(part, Placeholder):
                opening.append(part)
                continue
            is_answer = roles[part.message] == ASSISTANT
            if is_answer and _without_trailing_space(opening) == self._generation_prompt(
                roles[: part.message]
            ):
                supervised.add(part.message)
            opening = []
        return frozenset(supervised)

    def _generation_prompt(self, roles: tuple[str, ...]) -> list[str | SpecialToken] | None:
        """Return the template's text after the last message; None if it rejects the roles."""
        if roles not in self._generation_prompts:
            if len(self._generation_prompts) >= _MAX_CACHED_PROMPTS:
                self._generation_prompts.clear()
            end: list[str | SpecialToken] | None = []
            try:
                for part in self._parse(roles, True):
                    end = [] if isinstance(part, Placeholder) else [*(end or []), part]
            except TokenizerError:
                end = None
            self._generation_prompts[roles] = None if end is None else _without_trailing_space(end)
        return self._generation_prompts[roles]

    def _parse(
        self, roles: tuple[str, ...], add_generation_prompt: bool
    ) -> Iterator[str | Placeholder | SpecialToken]:
        """Yield text, control tokens and placeholders in the order in which they are written."""
        placeholders = [f"{_SPACE}\ue000{i}\ue001{_SPACE}" for i in range(len(roles))]
        # Line breaks around the placeholders show which characters the template strips.
        plain, before, after = (
            _PLACEHOLDER.split(self._render(roles, contents, add_generation_prompt))
            for contents in (
                placeholders,
                [f"\n{text}" for text in placeholders],
                [f"{text}\n" for text in placeholders],
            )
        )
        if not len(plain) == len(before) == len(after):
            raise TokenizerError(
                "the model's chat template depends on the text of messages; it cannot be used"
            )
        parts: list[str | Placeholder] = [plain[0]]
        for index in range(1, len(plain), 4):
            left, number, right, text = plain[index : index + 4]
            placeholder = Placeholder(
                int(number),
                "" if not left else "\n" if before[index - 1] == plain[index - 1] else None,
                "" if not right else "\n" if after[index + 3] == text else None,
            )
            parts += [placeholder, text]
        self._check_messages_are_kept(parts, roles, add_generation_prompt)
        for part in parts:
            yield from self._split_special(part) if isinstance(part, str) else [part]

    def _check_messages_are_kept(
        self,
        parts: Sequence[str | Placeholder],
        roles: tuple[str, ...],
        add_generation_prompt: bool,
    ) -> None:
        """Raise TokenizerError unless the template writes every message, changed by strip only."""
        kept = {part.message for part in parts if isinstance(part, Placeholder)}
        for index, role in enumerate(roles):
            if index not in kept:
                raise TokenizerError(
                    f"the model's chat template leaves out message {index + 1} of "
                    f"{', '.join(roles)} (role {role}), or does not accept text as its content"
                )
        probes = [f"Message {index} {_PROBE_TEXT}" for index in range(len(roles))]
        for contents in (probes, [f" \n {text} \n " for text in probes]):
            written = self._render(roles, contents, add_generation_prompt)
            if kept > set(range(len(roles))) or written != "".join(
                part if isinstance(part, str) else part.strip(contents[part.message])
                for part in parts
            ):
                raise TokenizerError(
                    "the model's chat template shortens or changes messages; it cannot be used"
                )

    def _split_special(self, text: str) -> Iterator[str | SpecialToken]:
        """Split text of the template into plain text and control tokens."""
        start, strips = 0, False
        for match in self._special.finditer(text):
            token = self.special_tokens[match[0]]
            between = text[start : match.start()]
            between = between.lstrip() if strips else between
            yield between.rstrip() if token.lstrip else between
            yield token
            start, strips = match.end(), token.rstrip
        yield text[start:].lstrip() if strips else text[start:]


def _to_layout(
    rendered: Sequence[str | Placeholder | SpecialToken],
    roles: tuple[str, ...],
    supervised: frozenset[int],
) -> Layout:
    """Group parts into segments and control tokens.

    An answer starts a segment of its own, because generation starts there too. It extends up to
    and including the control token that ends it.
    """
    layout: list[TextSegment | ControlToken] = []
    parts: list[str | Placeholder] = []
    position: TextPosition = "start"
    answer: int | None = None  # index of the answer that the current segment belongs to

    def end_segment(*, at_control: bool) -> None:
        nonlocal position
        # If no control token ends an answer, it consists of its leading space and its text.
        size = len(parts) if at_control or answer is None else 2
        for segment, owner in ((parts[:size], answer), (parts[size:], None)):
            if any(segment):
                layout.append(TextSegment(tuple(segment), position, owner, owner in supervised))
                position = "inline"
        parts.clear()

    for part in rendered:
        if isinstance(part, SpecialToken):
            end_segment(at_control=True)
            layout.append(ControlToken(part.id, answer, answer in supervised))
            position, answer = "after_control", None
        elif isinstance(part, Placeholder) and (
            answer is not None or roles[part.message] == ASSISTANT
        ):
            # A space before an answer belongs to the answer: prompts end without it.
            opening = parts.pop() if parts else ""
            assert isinstance(opening, str), "an answer ends before the next message"
            stripped = opening.rstrip(" ")
            parts.append(stripped)
            end_segment(at_control=False)
            parts = [opening[len(stripped) :], part]
            answer = part.message if roles[part.message] == ASSISTANT else None
        else:
            parts.append(part)
    end_segment(at_control=False)
    return tuple(layout)


def _without_trailing_space(opening: Sequence[str | SpecialToken]) -> list[str | SpecialToken]:
    """Remove the space at the end, which belongs to the answer."""
    *others, last = opening
    assert isinstance(last, str), "text, possibly empty, follows each control token"
    return [*others, last.rstrip(" ")]


def _bounded_range() -> Callable[..., range]:
    """Return a `range` for one rendering, limited to _MAX_OUTPUT numbers in total."""
    budget = _MAX_OUTPUT

    def bounded(*bounds: int) -> range:
        nonlocal budget
        numbers = range(*bounds)
        budget -= min(len(numbers), budget + 1)
        if budget < 0:
            raise OverflowError("its loops are too long")
        return numbers

    return bounded


def _compile(source: str) -> Any:
    """Compile a template as transformers does: sandbox, filters, functions, white space."""
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
                lengths = [len(side) for side in (left, right) if hasattr(side, "__len__")]
                times = [side for side in (left, right) if isinstance(side, int)]
                if lengths and times and lengths[0] * times[0] > _MAX_OUTPUT:
                    raise OverflowError("it repeats a string too often")
            elif max(abs(left), abs(right)) > 1000:
                raise OverflowError("its numbers are too large")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    now = datetime.now()  # fixed, so that renderings can be compared
    environment.globals["strftime_now"] = now.strftime
    # The tag {% generation %} only marks answers for transformers.
    plain = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", source)
    plain = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", plain)
    try:
        return environment.from_string(plain)
    except Exception as error:  # Jinja's errors, and Python's: Jinja compiles to Python
        raise TokenizerError(f"the model's chat template cannot be read: {error}") from error
