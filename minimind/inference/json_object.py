"""Answers that are one JSON object (RFC 8259): at each token, those that can still lead to one.

A pushdown automaton reads bytes. A token is allowed when the automaton can read its bytes and when
the object can then still be closed with the tokens that are left, one byte each; so an answer is
a whole object even where it is cut at its limit. Narrower than the RFC where a parser might
stumble: no lone surrogates, numbers of at most 15 digits and exponents of 2, 8 blanks in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind.tokenizer import Tokenizer

_MOST_BLANKS, _MOST_DIGITS, _MOST_EXPONENT_DIGITS = 8, 15, 2
LEAST_TOKENS = 2  # {}
_NEVER = 2**15 - 1  # more tokens than any answer may have left to close its brackets
_BLANKS, _DIGITS, _HEX = b" \t\n\r", b"0123456789", b"0123456789abcdefABCDEF"
_LITERALS = {b"t"[0]: "rue", b"f"[0]: "alse", b"n"[0]: "ull"}


class State(NamedTuple):
    """Where the automaton is: what it reads, what is open around it, how long a run is."""

    mode: str
    stack: str = ""  # "{" and "[" that are open; then "k" in a key, "v" in another string
    run: int = 0  # blanks or digits so far


START = State("object")
DONE = State("done")


def step(state: State, byte: int) -> State | None:
    """The state after one more byte; None where it may not stand."""
    mode, stack, run = state
    if mode in _STRING_STEPS:
        return _in_string(state, byte)
    if mode in _NUMBER_STEPS:
        return _in_number(state, byte)
    if mode.startswith("literal "):
        rest = mode[8:]
        if byte != ord(rest[0]):
            return None
        return State(f"literal {rest[1:]}", stack) if rest[1:] else State("after", stack)
    if byte in _BLANKS:
        allowed = run < _MOST_BLANKS and mode not in ("object", "done")
        return State(mode, stack, run + 1) if allowed else None
    return _between(mode, stack, byte)


def _between(mode: str, stack: str, byte: int) -> State | None:
    """Between values and keys."""
    char = chr(byte)
    if mode == "object":
        return State("first key", "{") if char == "{" else None
    if mode in ("first key", "key"):
        if char == '"':
            return State("string", stack + "k")
        return _close(stack) if char == "}" and mode == "first key" else None
    if mode == "colon":
        return State("value", stack) if char == ":" else None
    if mode == "after":
        if char == ",":
            return State("key" if stack[-1] == "{" else "value", stack)
        return _close(stack) if char == {"{": "}", "[": "]"}[stack[-1]] else None
    if mode == "first value" and char == "]":
        return _close(stack)
    return _begin_value(stack, byte) if mode in ("value", "first value") else None


def _begin_value(stack: str, byte: int) -> State | None:
    char = chr(byte)
    if char in "{[":
        return State("first key" if char == "{" else "first value", stack + char)
    if char == '"':
        return State("string", stack + "v")
    if byte in _LITERALS:
        return State(f"literal {_LITERALS[byte]}", stack)
    if char in "-0":
        return State("minus" if char == "-" else "zero", stack)
    return State("digits", stack, 1) if byte in _DIGITS else None


def _close(stack: str) -> State:
    return State("after", stack[:-1]) if stack[1:] else DONE


_STRING_STEPS = frozenset({"string", "escape", "u4", "u3", "u3 d", "u2", "u1"})


def _in_string(state: State, byte: int) -> State | None:
    mode, stack, _ = state
    if mode == "string":
        if byte == ord('"'):
            return State("colon" if stack[-1] == "k" else "after", stack[:-1])
        if byte == ord("\\"):
            return State("escape", stack)
        return state if byte >= 0x20 else None
    if mode == "escape":
        if byte == ord("u"):
            return State("u4", stack)
        return State("string", stack) if byte in b'"\\/bfnrt' else None
    if byte not in (b"01234567" if mode == "u3 d" else _HEX):  # D800 and on are surrogates
        return None
    if mode == "u4":
        return State("u3 d" if byte in b"dD" else "u3", stack)
    return State({"u3": "u2", "u3 d": "u2", "u2": "u1", "u1": "string"}[mode], stack)


_NUMBER_STEPS = frozenset(
    {"minus", "zero", "digits", "point", "fraction", "e", "e sign", "exponent"}
)


def _in_number(state: State, byte: int) -> State | None:
    mode, stack, run = state
    if byte in _DIGITS:
        if mode == "minus":
            return State("zero", stack) if byte == ord("0") else State("digits", stack, 1)
        into = {"point": "fraction", "e": "exponent", "e sign": "exponent"}
        if mode in into:
            return State(into[mode], stack, 1)
        most = _MOST_EXPONENT_DIGITS if mode == "exponent" else _MOST_DIGITS
        return State(mode, stack, run + 1) if mode != "zero" and run < most else None
    if byte == ord(".") and mode in ("zero", "digits"):
        return State("point", stack)
    if byte in b"eE" and mode in ("zero", "digits", "fraction"):
        return State("e", stack)
    if byte in b"+-" and mode == "e":
        return State("e sign", stack)
    ended = mode in ("zero", "digits", "fraction", "exponent")
    return step(State("after", stack), byte) if ended else None


_COSTS = {
    "object": 2, "first key": 0, "key": 4, "colon": 2, "value": 1, "first value": 0, "after": 0,
    "string": 0, "escape": 1, "u4": 4, "u3": 3, "u3 d": 3, "u2": 2, "u1": 1,
    "minus": 1, "zero": 0, "digits": 0, "point": 1, "fraction": 0, "e": 1, "e sign": 1,
    "exponent": 0, "done": 0,
}  # fmt: skip


def cost(state: State) -> int:
    """How many bytes end the object from here, at the least."""
    mode, stack, _ = state
    own = len(mode) - 8 if mode.startswith("literal ") else _COSTS[mode]
    # A string needs its quote, a key also a colon and a value.
    return own + len(stack) + (2 if stack.endswith("k") else 0)


class _Node:
    """A place in the trie of the tokens' bytes."""

    __slots__ = ("children", "ids")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.ids: list[int] = []


class JsonGrammar:
    """The tokens of one tokenizer as seen by the automaton; what it finds out is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._words = tokenizer.text_bytes_of
        self._kept: Any = lru_cache(maxsize=64)(self._costs_after)

    def costs_after(self, state: State) -> Tensor:
        """[vocab] int16: what `cost` is after each token; huge for those that may not stand."""
        return self._kept(state)

    def after(self, state: State, token: int) -> State:
        """The state after an allowed token."""
        for byte in self._words[token]:
            following = step(state, byte)
            assert following is not None, "the token was not allowed"
            state = following
        return state

    def _costs_after(self, state: State) -> Tensor:
        costs = torch.full((len(self._words),), _NEVER, dtype=torch.int16)
        trie = self._trie
        if state.mode == "string":  # most tokens are text that changes nothing
            costs[self._plain] = cost(state)
            trie = self._special_trie
        ids, found = [], []
        for node, after in _readable(trie, state):
            ids += node.ids
            found += [min(cost(after), _NEVER)] * len(node.ids)
        costs[ids] = torch.tensor(found, dtype=torch.int16)
        return costs

    @cached_property
    def _plain(self) -> list[int]:
        """Tokens that are text within a string, whatever comes before and after."""
        return [i for i, word in enumerate(self._words) if word and _is_plain(word)]

    @cached_property
    def _trie(self) -> _Node:
        return _make_trie((i, word) for i, word in enumerate(self._words) if word)

    @cached_property
    def _special_trie(self) -> _Node:
        words = enumerate(self._words)
        return _make_trie((i, word) for i, word in words if word and not _is_plain(word))


def _is_plain(word: bytes) -> bool:
    return min(word) >= 0x20 and b'"' not in word and b"\\" not in word


def _make_trie(words: Iterator[tuple[int, bytes]]) -> _Node:
    root = _Node()
    for token, word in words:
        node = root
        for byte in word:
            node = node.children.setdefault(byte, _Node())
        node.ids.append(token)
    return root


def _readable(root: _Node, state: State) -> Iterator[tuple[_Node, State]]:
    """The nodes that hold tokens and that the automaton can reach, and where it is then."""
    open_nodes = [(root, state)]
    while open_nodes:
        node, before = open_nodes.pop()
        for byte, child in node.children.items():
            if (after := step(before, byte)) is not None:
                if child.ids:
                    yield child, after
                open_nodes.append((child, after))


@dataclass
class JsonConstraint:
    """Keeps one answer to a JSON object within `tokens_left` tokens: LEAST_TOKENS or more."""

    grammar: JsonGrammar
    tokens_left: int
    state: State = START

    def allowed(self) -> Tensor:
        """[vocab] bool: the tokens that may come next."""
        return self.grammar.costs_after(self.state) < min(self.tokens_left, _NEVER)

    def advance(self, token: int) -> None:
        """One of them has been chosen."""
        self.state = self.grammar.after(self.state, token)
        self.tokens_left -= 1

    @property
    def is_met(self) -> bool:
        """Whether the object has closed."""
        return self.state == DONE
