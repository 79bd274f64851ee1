"""Grammar-constrained decoding with llguidance: JSON objects and JSON schemas.

A mask marks the tokens that the grammar allows next. It is computed in a thread pool while the
model computes the logits that it applies to.
"""

import subprocess
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from minimind.environment import python_module
from minimind.errors import ModelError, UsageError
from minimind.inference.grammar_check import CHECK_SECONDS
from minimind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_DEPTH = 64  # nested objects and arrays; parsers have limits between 100 and 1,000 levels
# Without a bound some models generate whitespace up to the token limit.
_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}
_LIMITS = LLParserLimits(verbose_errors=False)
_TOO_COMPLEX = "it is too complex: compiling it takes too long or too much memory"
_POOL = ThreadPoolExecutor(4, "minimind-grammar")  # llguidance releases the GIL


class GrammarCompiler:
    """Compiles JSON schemas for one tokenizer.

    Construction builds a trie of all tokens: about a second for 150,000 of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = _Vocabulary(tokenizer)
        self._tokenizer = LLTokenizer(
            self._vocabulary,  # type: ignore[arg-type]  # any object with these attributes
            eos_token=list(tokenizer.stop_ids),
            slices=LLTokenizer.json_slices(),
        )

    def compile(self, schema: Mapping[str, Any] = ANY_OBJECT) -> "Grammar":
        """Compile a schema. Raises UsageError with the reason when it cannot be enforced."""
        try:
            text = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_OPTIONS)
        except ValueError as error:
            raise UsageError(_one_line(str(error))) from None
        try:
            reason = "" if schema is ANY_OBJECT else _unsupported_reason(text)
        except subprocess.SubprocessError:
            reason = _TOO_COMPLEX
        if reason:
            raise UsageError(_one_line(reason))
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise UsageError(_one_line(matcher.get_error()))
        return Grammar(matcher, self._vocabulary)


@dataclass(frozen=True)
class Grammar:
    """A compiled schema, for any number of completions."""

    _matcher: LLMatcher
    _vocabulary: "_Vocabulary"

    def start(self) -> "GrammarConstraint":
        """Return the constraint of one completion."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary)


class GrammarConstraint:
    """The state of one completion; see `requests.Constraint`.

    is_met: the JSON value is complete and nothing can follow it.
    is_stuck: no token is allowed, because the schema requires more than MAX_DEPTH levels, or a
        value that contains itself.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: "_Vocabulary") -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._nesting = _Nesting()
        self.is_met = self.is_stuck = False
        self._mask: Future[Tensor] = _POOL.submit(self._compute_mask)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next mask; return True when it is ready."""
        return bool(wait([self._mask], seconds).done)

    def allowed(self) -> Tensor:
        """Return the next mask, [vocab] bool; block until it is ready.

        Raises ModelError when llguidance fails.
        """
        return self._mask.result()

    def advance(self, token: int) -> None:
        """Append a token that the mask allows. Raises ModelError when llguidance rejects it."""
        if not self._matcher.consume_token(token):
            raise ModelError(_one_line(self._matcher.get_error()))
        self._nesting.update(self._vocabulary.tokens[token])
        self.is_met = self._matcher.is_stopped()
        if not self.is_met:
            self._mask = _POOL.submit(self._compute_mask)

    def _compute_mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            error = self._matcher.get_error()
            if error.startswith("NoExtensionBias"):  # no value satisfies this part of the schema
                self.is_stuck = True
                return torch.zeros(len(self._vocabulary.tokens), dtype=torch.bool)
            raise ModelError(_one_line(error))
        allowed = np.unpackbits(bits, count=len(self._vocabulary.tokens), bitorder="little")
        levels_left = MAX_DEPTH - self._nesting.depth
        if levels_left < self._vocabulary.max_opens:
            too_deep = self._vocabulary.opens > levels_left
            if self._nesting.in_string:
                too_deep &= self._vocabulary.has_quote
            allowed[too_deep] = 0
        self.is_stuck = not allowed.any()
        return torch.from_numpy(allowed.view(np.bool_))


@lru_cache(256)
def _unsupported_reason(grammar: str) -> str:
    """Return why a grammar cannot be used, or an empty string; see `grammar_check`.

    Raises SubprocessError, which is not cached, when the machine may have been too busy or short of
    memory for the check.
    """
    command = python_module("minimind.inference.grammar_check")
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=CHECK_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        if error.returncode == -9:  # SIGKILL, such as from the kernel when memory runs out
            raise
        return _TOO_COMPLEX
    return done.stdout.decode()


class _Nesting:
    """Nesting depth at the end of an incomplete JSON text."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False

    def update(self, text: bytes) -> None:
        for byte in text:
            if self.in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == ord("\\"):
                    self._escaped = True
                elif byte == ord('"'):
                    self.in_string = False
            elif byte == ord('"'):
                self.in_string = True
            else:
                self.depth += (byte in b"[{") - (byte in b"]}")


class _Vocabulary:
    """Adapter of a tokenizer to the interface that llguidance expects."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.bytes_of
        self.eos_token_id = tokenizer.stop_ids[0]
        self.special_token_ids = [i for i, text in enumerate(tokenizer.text_bytes_of) if not text]

    def __call__(self, text: str) -> list[int]:
        """Tokenize text that the grammar requires, without changing a byte."""
        [ids] = self._tokenizer.encode_segments([(text, "inline")])
        expected = text.encode()
        if b"".join(self.tokens[i] for i in ids) == expected:
            return ids
        return [self._byte_ids[byte] for byte in expected]  # the tokenizer normalizes this text

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    @cached_property
    def opens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of opening brackets per token, [vocab]."""
        return np.array([token.count(b"[") + token.count(b"{") for token in self.tokens])

    @cached_property
    def max_opens(self) -> int:
        return int(self.opens.max())

    @cached_property
    def has_quote(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True for tokens that may end a string, [vocab]."""
        return np.array([b'"' in token for token in self.tokens])


def _one_line(message: str) -> str:
    return " ".join(message.split()).rstrip(".")
