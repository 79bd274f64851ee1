"""Grammar-constrained decoding: random walks always end in valid JSON."""

import json
import random
import subprocess
import sys
import threading
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pydantic_core import from_json

from minimind.errors import UsageError
from minimind.inference import grammar as grammar_module
from minimind.inference.engine import Engine
from minimind.inference.grammar import MAX_DEPTH, Grammar, GrammarCompiler
from minimind.inference.requests import Piece, Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.conftest import TEXTS
from tests.support.commands import fast_python
from tests.support.foreign import SHAPES, make_tokenizer
from tests.support.small_benchmarks import make_varied

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "born", "alive"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "person": _PERSON,
    "list of enums": {
        "type": "array",
        "items": {"enum": ["长江", "Ångström", 'a"b\\c', None, 3, {"k": [1]}]},
        "minItems": 2,
        "maxItems": 5,
    },
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": ["number", "null"]},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "patterns and formats": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[a-z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        },
        "required": ["id"],
    },
    "integer": {"type": "integer"},
    "constant": {"const": {"a": ["null", "北京"]}},
}


@cache
def _delimiters(tokenizer: Tokenizer) -> torch.Tensor:
    """Return a mask of the tokens that are one delimiter."""
    return torch.tensor([token in (b'"', b"}", b"]", b",", b":") for token in tokenizer.bytes_of])


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, max_tokens: int = 60) -> str | None:
    """Generate random allowed tokens; None when the text is incomplete after `max_tokens`."""
    rng, constraint = random.Random(seed), grammar.start()
    ids: list[int] = []
    for _ in range(max_tokens):
        choices = constraint.allowed()
        # Half of the steps prefer delimiters: most tokens are text, so strings would not end.
        if rng.random() < 0.5 and (ending := choices & _delimiters(tokenizer)).any():
            choices = ending
        tokens = choices.nonzero()
        token = int(tokens[rng.randrange(len(tokens))])
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        constraint.advance(token)
        if constraint.is_met:
            break
    else:
        return None
    return tokenizer.decode(ids, skip_special_tokens=True)


def complete_texts(grammar: Grammar, tokenizer: Tokenizer, number: int) -> list[str]:
    """Return the texts of the first `number` complete walks, of 100 at most."""
    texts = (walk(grammar, tokenizer, seed) for seed in range(100))
    return list(islice((text for text in texts if text is not None), number))


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_random_walks_end_in_valid_json(schema: Any, tokenizer: Tokenizer) -> None:
    grammar = GrammarCompiler(tokenizer).compile(schema)
    texts = complete_texts(grammar, tokenizer, 10)
    assert len(texts) == 10
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("shape", SHAPES)
def test_foreign_tokenizers(shape: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(shape, tmp_path / "tokenizer", TEXTS))
    compiler = GrammarCompiler(tokenizer)
    for name, schema in SCHEMAS.items():
        grammar = compiler.compile(schema)
        texts = complete_texts(grammar, tokenizer, 3)
        assert len(texts) == 3, name
        for text in texts:
            jsonschema.validate(json.loads(text), schema)


def feed(grammar: Grammar, tokenizer: Tokenizer, text: str) -> Any:
    """Feed a text byte by byte, up to the first byte that is not allowed; `read` counts them."""
    byte = {token[0]: i for i, token in enumerate(tokenizer.bytes_of) if len(token) == 1}
    constraint = grammar.start()
    constraint.read = 0
    for character in text.encode():
        if not constraint.allowed()[byte[character]]:
            break
        constraint.advance(byte[character])
        constraint.read += 1
    return constraint


def test_nesting_is_bounded(tokenizer: Tokenizer) -> None:
    grammar = GrammarCompiler(tokenizer).compile()
    assert feed(grammar, tokenizer, '{"a":' + "[" * 100).read == 5 + MAX_DEPTH - 1
    deepest = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert feed(grammar, tokenizer, deepest).is_met
    assert from_json(deepest)
    # Brackets inside a string do not nest.
    inside = '{"[[[":' + "[" * (MAX_DEPTH - 1) + '"\\"[[{{[[",{"'
    assert feed(grammar, tokenizer, inside).read == len(inside) - 2


def test_a_schema_that_requires_deeper_nesting_gets_stuck(tokenizer: Tokenizer) -> None:
    node = {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1}
    endless = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    grammar = GrammarCompiler(tokenizer).compile(endless)
    assert feed(grammar, tokenizer, "[" * 100).read == MAX_DEPTH
    constraint = feed(grammar, tokenizer, "[" * MAX_DEPTH + " " * 8)
    assert constraint.wait(10)
    assert constraint.is_stuck


def test_a_value_that_contains_itself_gets_stuck_at_its_start(tokenizer: Tokenizer) -> None:
    loop = {"$ref": "#/$defs/loop"}
    schema = {"properties": {"a": loop}, "required": ["a"], "$defs": {"loop": loop}}
    grammar = GrammarCompiler(tokenizer).compile({"type": "object"} | schema)
    constraint = feed(grammar, tokenizer, '{"a":')
    assert constraint.wait(10)
    assert not constraint.allowed().any()
    assert constraint.is_stuck


def test_whitespace_is_bounded(tokenizer: Tokenizer) -> None:
    grammar = GrammarCompiler(tokenizer).compile()
    assert feed(grammar, tokenizer, "{" + " " * 30).read == 9


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "colour"}, "Invalid type: colour"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater"),
        ({"$ref": "https://example.com/schema.json"}, "does not fetch"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "#"}, "no JSON value satisfies it"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "no JSON"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(
    schema: Any, reason: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError) as caught:
        GrammarCompiler(tokenizer).compile(schema)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def _chain(length: int) -> dict[str, Any]:
    """A schema of references to references."""
    links: dict[str, Any] = {"last": {"type": "null"}}
    for n in range(length):
        following = {"$ref": f"#/$defs/{n + 1 if n + 1 < length else 'last'}"}
        links[str(n)] = {"anyOf": [following, {"type": "array", "items": following}]}
    return {"$defs": links, "$ref": "#/$defs/0"}


def test_a_slow_check_is_repeated(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may have been busy."""
    compiler, schema = GrammarCompiler(tokenizer), {"const": "a slow check is repeated"}
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "CHECK_SECONDS", 1e-3)
        with pytest.raises(UsageError, match="too complex"):
            compiler.compile(schema)
    assert compiler.compile(schema)


def test_a_schema_that_crashes_the_compiler_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "CHECK_SECONDS", 3)
    compiler = GrammarCompiler(tokenizer)
    assert walk(compiler.compile(_chain(50)), tokenizer, 1)
    patterns = [{"pattern": f"(a|b)*{n}(c|d){{30}}"} for n in range(40)]
    for hostile in (_chain(5000), {"type": "string", "allOf": patterns}):
        with pytest.raises(UsageError, match="too complex"):
            compiler.compile(hostile)


def test_a_check_that_dies_is_no_success() -> None:
    script = "from minimind.inference import grammar_check as g; g.LLMatcher = None; g.main()"
    done = subprocess.run([*fast_python(), "-c", script], input=b"{}", capture_output=True)
    assert done.returncode == 1 and done.stdout == b""


def test_required_text_is_tokenized_as_usual(tokenizer: Tokenizer) -> None:
    """The model sees the tokens it was trained on, not single bytes."""
    constant = {"const": "长江是中国最长的河流"}
    constraint = GrammarCompiler(tokenizer).compile(constant).start()
    ids = []
    while not constraint.is_met:
        [token] = constraint.allowed().nonzero()[:, 0].tolist()
        ids.append(token)
        constraint.advance(token)
    assert ids == tokenizer.encode('"长江是中国最长的河流"')


def generate(engine: Engine, tokenizer: Tokenizer, **settings: Any) -> tuple[str, str | None]:
    request = Request(
        tokenizer.encode("长江"),
        Sampling(temperature=1.5),
        stop_ids=frozenset(tokenizer.stop_ids),
        **settings,
    )
    pieces = list(engine.submit(request))
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


def test_the_engine_follows_a_grammar_and_reports_truncation(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 6}
    grammar = GrammarCompiler(tokenizer).compile(schema)
    reasons = []
    with Engine(model, tokenizer, slots=4) as engine:
        for seed in range(20):
            text, reason = generate(
                engine, tokenizer, max_new_tokens=10, seed=seed, constraint=grammar.start()
            )
            reasons.append(reason)
            if reason == "stop":
                jsonschema.validate(json.loads(text), schema)
            else:
                with pytest.raises(json.JSONDecodeError):
                    json.loads(text)
    assert set(reasons) == {"stop", "length"}


def test_a_value_that_ends_at_the_token_limit_is_complete(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    grammar = GrammarCompiler(tokenizer).compile({"const": "长江"})
    length = len(tokenizer.encode('"长江"'))
    with Engine(model, tokenizer, slots=1) as engine:
        for limit, expected in ((length, ('"长江"', "stop")), (length - 1, ('"长江', "length"))):
            assert expected == generate(
                engine, tokenizer, max_new_tokens=limit, constraint=grammar.start()
            )


def test_a_slow_mask_does_not_delay_other_requests(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    class Slow:
        """A constraint whose masks are never ready."""

        def __init__(self) -> None:
            self.is_met = self.is_stuck = False
            self.requested, self.ready = threading.Event(), threading.Event()

        def wait(self, seconds: float) -> bool:
            self.requested.set()
            return self.ready.wait(seconds)

        def allowed(self) -> torch.Tensor:
            return torch.ones(tokenizer.vocab_size, dtype=torch.bool)

        def advance(self, token: int) -> None:
            self.ready.clear()

    prompt = tokenizer.encode("长江")
    slow = Slow()
    with Engine(model, tokenizer, slots=2) as engine:
        delivered: list[Piece] = []
        first = Request(prompt, Sampling(temperature=0), 8, constraint=slow)
        blocked = engine.submit(first, delivered.append)
        assert slow.requested.wait(10)
        other = engine.submit(Request(prompt, Sampling(temperature=0), 50))
        assert sum(len(piece.token_ids) for piece in other) == 50
        assert blocked.completion_tokens == 1
        blocked.cancel()


def test_llguidance_writes_nothing_to_stderr(
    tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = GrammarCompiler(tokenizer)
    with pytest.raises(UsageError):
        compiler.compile({"type": "colour"})
    assert not feed(compiler.compile(), tokenizer, '{"a": tru').is_met
    sys.stderr.flush()
    assert capfd.readouterr().err == ""


def test_rows_of_the_model_without_a_token_are_never_sampled(tokenizer: Tokenizer) -> None:
    """Embedding tables of foreign models are often padded."""
    model = make_varied(tokenizer, vocab_size=tokenizer.vocab_size + 21)
    grammar = GrammarCompiler(tokenizer).compile({"type": "array", "items": {"type": "integer"}})
    with Engine(model, tokenizer, slots=1) as engine:
        for seed in range(3):
            request = Request(
                [5], Sampling(temperature=2), 12, seed=seed, constraint=grammar.start()
            )
            ids = [token for piece in engine.submit(request) for token in piece.token_ids]
            assert ids
            assert max(ids) < tokenizer.vocab_size
