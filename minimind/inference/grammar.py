"""Grammar-constrained decoding with llguidance: JSON objects and JSON schemas.

Before each token a mask marks those that the grammar allows. A mask is computed in a thread pool
while the model computes the logits that it will be applied to.
"""

import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from minimind.errors import ModelError, UsageError
from minimind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_DEPTH = 64  # nested objects and arrays: parsers refuse more, at 100 or at 1,000 levels
CHECK_SECONDS = 10
# Without a bound some models write spaces until the limit.
_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}
_LIMITS = LLParserLimits(verbose_errors=False)
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
        """Raise UsageError with the reason where the schema cannot be enforced."""
        try:
            text = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_OPTIONS)
        except ValueError as error:
            raise UsageError(_one_line(str(error))) from None
        if schema is not ANY_OBJECT and (reason := _unsupported_reason(text)):
            raise UsageError(_one_line(reason))
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise UsageError(_one_line(matcher.get_error()))
        return Grammar(matcher, self._vocabulary)


@dataclass(frozen=True)
class Grammar:
    """A compiled schema; any number of answers can follow it."""

    _matcher: LLMatcher
    _vocabulary: "_Vocabulary"

    def start(self) -> "GrammarConstraint":
        """Return the constraint of one answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary)


class GrammarConstraint:
    """The state of one answer; see engine.Constraint.

    is_met: the value is complete and nothing can follow it. is_stuck: no token is allowed, because
    the schema demands more than MAX_DEPTH levels or a value that refers to itself.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: "_Vocabulary") -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._nesting = _Nesting()
        self.is_met = self.is_stuck = False
        self._mask: Future[Tensor] = _POOL.submit(self._compute_mask)

    def wait(self, seconds: float) -> bool:
        """Wait so long for the next mask, and return whether it is there."""
        return bool(wait([self._mask], seconds).done)

    def allowed(self) -> Tensor:
        """[vocab] bool; wait for the mask where it is not ready. Raise ModelError on an error."""
        return self._mask.result()

    def advance(self, token: int) -> None:
        """Append a token that the mask allows."""
        if not self._matcher.consume_token(token):
            raise ModelError(_one_line(self._matcher.get_error()))
        self._nesting.read(self._vocabulary.tokens[token])
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
        room = MAX_DEPTH - self._nesting.depth
        if room < self._vocabulary.most_opens:
            too_deep = self._vocabulary.opens > room
            if self._nesting.in_string:
                too_deep &= self._vocabulary.has_quote
            allowed[too_deep] = 0
        self.is_stuck = not allowed.any()
        return torch.from_numpy(allowed.view(np.bool_))


@lru_cache(256)
def _unsupported_reason(grammar: str) -> str:
    """Why a grammar cannot be used; empty if it can. See grammar_check."""
    command = [sys.executable, "-m", "minimind.inference.grammar_check"]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=CHECK_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return "it is too complex: compiling it takes too long, or too much memory"
    return done.stdout.decode()


class _Nesting:
    """How deep a JSON text is nested where it has been read to."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False

    def read(self, text: bytes) -> None:
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
    """A tokenizer in the form that llguidance reads; control tokens stand for no text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.bytes_of
        self.eos_token_id = tokenizer.stop_ids[0]
        self.special_token_ids = [i for i, text in enumerate(tokenizer.text_bytes_of) if not text]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that the grammar dictates, to the byte."""
        [ids] = self._tokenizer.encode_segments([(text, "inline")])
        wanted = text.encode()
        if b"".join(self.tokens[i] for i in ids) == wanted:
            return ids
        return [self._byte_ids[byte] for byte in wanted]  # the tokenizer normalizes this text

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    @cached_property
    def opens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[vocab] opening brackets in each token."""
        return np.array([token.count(b"[") + token.count(b"{") for token in self.tokens])

    @cached_property
    def most_opens(self) -> int:
        return int(self.opens.max())

    @cached_property
    def has_quote(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[vocab] whether a token may end a string."""
        return np.array([b'"' in token for token in self.tokens])


def _one_line(message: str) -> str:
    return " ".join(message.split()).rstrip(".")
