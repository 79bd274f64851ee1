"""Models of architectures that only transformers (an optional dependency) supports.

They are slower than native models, because there is no prefix cache. Metrics are comparable.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minimind.errors import MinimindError, ModelError, TokenizerError
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.models import name_of, name_of_device
from minimind.evaluation.scoring import Row, Scorer
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.failures import NON_FINITE
from minimind.inference.requests import Request
from minimind.model import fingerprint
from minimind.model.device import choose_device
from minimind.tokenizer.chat import Message
from minimind.version import __version__

K = TypeVar("K")

_MAX_BATCH_SIZE = 8  # for generation
_GROUP_SIZE = 64  # items that are scored together
_BATCH_TOKENS = 2048  # tokens per forward pass when scoring


def is_installed() -> bool:
    """Return True if transformers can be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


class TransformersModel:
    """A directory with any causal language model of transformers, without remote code."""

    adapter = None

    def __init__(
        self, directory: Path, device: str = "auto", *, context: int | None = None
    ) -> None:
        """Load the model in float32. Raises ModelError if that fails."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.directory, self.name, self.context = directory, name_of(directory), context
        chosen = choose_device(device)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # transformers raises errors of many classes
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{directory}: transformers cannot load it either: {reason}"
            ) from error
        max_context = _max_context(model)
        if context is not None and context > max_context:
            raise ModelError(
                f"{directory}: a context of {context:,} tokens is more than the model's "
                f"{max_context:,}; give a context of at most {max_context}"
            )
        self._model = model.to(chosen).eval()

    def identity(self) -> dict[str, Any]:
        """Return everything that results depend on besides the task."""
        from transformers import __version__ as transformers_version

        return {
            "version": __version__,
            "model": fingerprint(self.directory),
            "adapter": None,
            "context": self.context,
            "by": f"transformers {transformers_version}",
            "device": name_of_device(self._model.device),
            "dtype": "float32",
        }

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """Return a float32 scorer."""
        return _Scorer(self._model, self.context), _TransformersEncoder(
            self._tokenizer, self.directory
        )

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Answer conversations; see Model.

        Greedy decoding batches prompts of the same length; sampling answers one by one.
        """
        encoder = _TransformersEncoder(self._tokenizer, self.directory)
        context = self.context or _max_context(self._model)
        prompts: dict[int, list[int]] = {}
        for index, messages in enumerate(conversations):
            try:
                prompt = encoder.prompt(messages)
                Request(prompt).check(context)
                prompts[index] = prompt
            except MinimindError as error:
                yield index, error
        remaining = sorted(prompts, key=lambda index: len(prompts[index]))
        greedy = generation.temperature == 0
        batch_size = min(_MAX_BATCH_SIZE, generation.concurrency) if greedy else 1
        before = time.perf_counter()
        while remaining:
            length = len(prompts[remaining[0]])
            batch = [i for i in remaining[:batch_size] if len(prompts[i]) == length]
            remaining = remaining[len(batch) :]
            limit = min(generation.max_new_tokens, context - length)
            outputs = self._generate(
                [prompts[i] for i in batch],
                replace(generation, max_new_tokens=limit),
                generation.seed_for(conversations[batch[0]]),
            )
            for index, ids in zip(batch, outputs, strict=True):
                now = time.perf_counter()
                text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
                ended = len(ids) < limit
                yield index, Answer(text, len(ids), ended, now - before)
                before = now

    def _generate(
        self, prompts: Sequence[Sequence[int]], generation: GenerationConfig, seed: int
    ) -> list[list[int]]:
        """Return the new tokens of prompts of the same length, without stop tokens."""
        tokens = torch.tensor(prompts, device=self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if generation.temperature:
            torch.manual_seed(seed)
            sampling = {"do_sample": True, "top_k": 0, "top_p": generation.top_p}
            sampling["temperature"] = generation.temperature
        stops = self._model.generation_config.eos_token_id
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        with torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=generation.max_new_tokens,
                pad_token_id=_TransformersEncoder(self._tokenizer, self.directory).text_end,
                **sampling,
            )
        rows = output[:, tokens.shape[1] :].tolist()
        return [list(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]


def _max_context(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2048


class _Scorer:
    """Scorer that batches rows of similar length, padded on the right.

    The causal mask hides the padding, so no attention mask is needed.
    """

    def __init__(self, model: Any, context: int | None) -> None:
        self.context = context or _max_context(model)
        self._model = model

    def score(
        self, items: Iterable[tuple[K, Sequence[Row]]]
    ) -> Iterator[tuple[K, list[float] | Exception]]:
        """Score (key, rows) pairs; see Scorer.

        If a group of items fails, each item is scored separately to find the cause.
        """
        iterator = iter(items)
        while group := list(itertools.islice(iterator, _GROUP_SIZE)):
            try:
                scores = self._scores([rows for _, rows in group])
            except Exception:
                scores = [self._score_item(rows) for _, rows in group]
            for (key, _), item_scores in zip(group, scores, strict=True):
                yield key, item_scores

    def _score_item(self, rows: Sequence[Row]) -> list[float] | Exception:
        try:
            return self._scores([rows])[0]
        except Exception as error:
            return error

    def _scores(self, items: Sequence[Sequence[Row]]) -> list[list[float] | Exception]:
        by_input: dict[tuple[int, ...], list[Row]] = {}
        for row in itertools.chain(*items):
            by_input.setdefault(row.tokens[:-1], []).append(row)
        inputs = sorted(by_input, key=len, reverse=True)
        scores: dict[Row, float] = {}
        while inputs:
            batch_size = max(_BATCH_TOKENS // len(inputs[0]), 1)
            batch, inputs = inputs[:batch_size], inputs[batch_size:]
            for tokens, logits in zip(batch, self._logits(batch), strict=True):
                scores |= {row: _log_likelihood(logits, row) for row in by_input[tokens]}
        return [_finite_or_error([scores[row] for row in rows]) for rows in items]

    @torch.inference_mode()
    def _logits(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Return logits [inputs, tokens, vocab]; the first input must be the longest."""
        width = len(batch[0])
        padded = [[*ids, *[0] * (width - len(ids))] for ids in batch]
        tokens = torch.tensor(padded, device=self._model.device)
        return self._model(tokens, use_cache=False).logits


def _log_likelihood(logits: Tensor, row: Row) -> float:
    """Return the log-likelihood of a row. logits: [tokens, vocab], with those of the padding."""
    positions = torch.arange(row.start - 1, len(row.tokens) - 1, device=logits.device)
    tokens = torch.tensor(row.tokens[row.start :], device=logits.device)
    log_probs = logits[positions].float().log_softmax(-1).gather(1, tokens[:, None])
    return sum(log_probs[:, 0].tolist())


def _finite_or_error(scores: list[float]) -> list[float] | Exception:
    return scores if all(map(math.isfinite, scores)) else ModelError(NON_FINITE)


class _TransformersEncoder:
    """Encoder based on the tokenizer of transformers."""

    def __init__(self, tokenizer: Any, directory: Path) -> None:
        self._tokenizer, self._directory = tokenizer, directory
        plain = self.encode_batch(["a"])[0]
        full = tokenizer("a")["input_ids"]
        self.text_start = full[: full.index(plain[0])] if plain and plain[0] in full else []
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self.text_end: int = next(token for token in candidates if token is not None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of plain texts, without special tokens."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template. Raises TokenizerError if there is none or it fails."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise TokenizerError(
                f"{self._directory}: the chat template rejects the messages ({error}); "
                "--style letter and --style answer need no chat template"
            ) from error

    def answer(self, text: str) -> list[int]:
        """Return the ids of the text alone, as at the start of a line."""
        return self.encode_batch([text])[0]
