"""Models that are not ours to read, by transformers: the one place that knows it, an extra.

They are slower, for nothing that questions begin with is shared; figures are the same kind.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.errors import MinimindError, ModelError, TokenizerError
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.models import name_of, name_of_device
from minimind.evaluation.scoring import Row, Scorer
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.failures import NON_FINITE
from minimind.model import fingerprint
from minimind.model.device import choose_device
from minimind.tokenizer.chat import Message
from minimind.version import __version__

_AT_ONCE = 8  # answers
_ITEMS = 64  # whose likelihoods are asked for together
_TOKENS = 2048  # read at once


def is_installed() -> bool:
    """Whether there is a transformers to fall back on."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


class TransformersModel:
    """A directory of any causal model that transformers ships a class for; no remote code."""

    adapter = None

    def __init__(
        self, directory: Path, device: str = "auto", *, context: int | None = None
    ) -> None:
        """Raises ModelError when it cannot be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.directory, self.name, self.context = directory, name_of(directory), context
        chosen = choose_device(device)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # whatever its files make of it
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{directory}: nor can transformers load it: {reason}") from error
        longest = _longest_of(model)
        if context is not None and context > longest:
            raise ModelError(
                f"{directory}: transformers reads {longest:,} tokens of it, and {context:,} are "
                f"asked for; give a context of at most {longest}"
            )
        self._model = model.to(chosen).eval()

    def identity(self) -> dict[str, Any]:
        """Return all that results depend on beside the task."""
        from transformers import __version__ as theirs

        return {
            "version": __version__,
            "model": fingerprint(self.directory),
            "adapter": None,
            "context": self.context,
            "by": f"transformers {theirs}",
            "device": name_of_device(self._model.device),
            "dtype": "float32",
        }

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """Likelihoods in float32."""
        return _Scorer(self._model, self.context), _Words(self._tokenizer, self.directory)

    def answers(
        self, questions: Sequence[str], manner: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """A few at once, those of one length together; what is drawn, one by one."""
        words = _Words(self._tokenizer, self.directory)
        prompts: dict[int, list[int]] = {}
        for place, question in enumerate(questions):
            try:
                prompts[place] = words.prompt([{"role": "user", "content": question}])
            except MinimindError as error:
                yield place, error
        order = sorted(prompts, key=lambda place: len(prompts[place]))
        at_once = min(_AT_ONCE, manner.at_once) if manner.temperature == 0 else 1
        before = time.perf_counter()
        while order:
            length = len(prompts[order[0]])
            some = [place for place in order[:at_once] if len(prompts[place]) == length]
            order = order[len(some) :]
            written = self._write([prompts[place] for place in some], questions[some[0]], manner)
            for place, ids in zip(some, written, strict=True):
                now = time.perf_counter()
                text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
                ended = len(ids) < manner.max_new_tokens
                yield place, Answer(text, len(ids), ended, now - before)
                before = now

    def _write(
        self, prompts: Sequence[Sequence[int]], question: str, manner: GenerationConfig
    ) -> list[list[int]]:
        """New tokens of prompts of one length, without the one that stopped them."""
        tokens = torch.tensor(prompts, device=self._model.device)
        drawn: dict[str, Any] = {"do_sample": False}
        if manner.temperature:
            torch.manual_seed(manner.seed_of(question))
            drawn = {"do_sample": True, "top_k": 0, "top_p": manner.top_p}
            drawn["temperature"] = manner.temperature
        stops = self._model.generation_config.eos_token_id
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        with torch.inference_mode():
            written = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=manner.max_new_tokens,
                pad_token_id=_Words(self._tokenizer, self.directory).text_end,
                **drawn,
            )
        rows = written[:, tokens.shape[1] :].tolist()
        return [list(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]


def _longest_of(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2048


class _Scorer:
    """Rows of like length in batches, padded on the right, where a causal model does not look."""

    def __init__(self, model: Any, context: int | None) -> None:
        self.context = context or _longest_of(model)
        self._model = model

    def score(self, items: Iterable[Sequence[Row]]) -> Iterator[list[float] | Exception]:
        """Many items at once; where that goes wrong, each alone, for it may be one's fault."""
        remaining = iter(items)
        while some := list(itertools.islice(remaining, _ITEMS)):
            try:
                found = self._scores(some)
            except Exception:
                found = [self._alone(rows) for rows in some]
            yield from found

    def _alone(self, rows: Sequence[Row]) -> list[float] | Exception:
        try:
            return self._scores([rows])[0]
        except Exception as error:
            return error

    def _scores(self, items: Sequence[Sequence[Row]]) -> list[list[float] | Exception]:
        wanted: dict[tuple[int, ...], list[Row]] = {}  # by what is read of it
        for row in itertools.chain(*items):
            wanted.setdefault(row.tokens[:-1], []).append(row)
        reads = sorted(wanted, key=len, reverse=True)
        scores: dict[Row, float] = {}
        while reads:
            at_once = max(_TOKENS // len(reads[0]), 1)
            batch, reads = reads[:at_once], reads[at_once:]
            for read, logits in zip(batch, self._logits(batch), strict=True):
                scores |= {row: _log_likelihood(logits, row) for row in wanted[read]}
        return [_checked([scores[row] for row in rows]) for rows in items]

    @torch.inference_mode()
    def _logits(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """[reads, tokens of the first, vocab]; the first is the longest."""
        width = len(batch[0])
        padded = [[*read, *[0] * (width - len(read))] for read in batch]
        tokens = torch.tensor(padded, device=self._model.device)
        return self._model(tokens, use_cache=False).logits


def _log_likelihood(logits: Tensor, row: Row) -> float:
    """logits: [tokens, vocab], of the row and what pads it."""
    where = torch.arange(row.start - 1, len(row.tokens) - 1, device=logits.device)
    tokens = torch.tensor(row.tokens[row.start :], device=logits.device)
    own = logits[where].float().log_softmax(-1).gather(1, tokens[:, None])
    return sum(own[:, 0].tolist())


def _checked(scores: list[float]) -> list[float] | Exception:
    return scores if all(map(math.isfinite, scores)) else ModelError(NON_FINITE)


class _Words:
    """By transformers' own tokenizer."""

    def __init__(self, tokenizer: Any, directory: Path) -> None:
        self._tokenizer, self._directory = tokenizer, directory
        bare = self.encode_batch(["a"])[0]
        full = tokenizer("a")["input_ids"]
        self.text_start = full[: full.index(bare[0])] if bare and bare[0] in full else []
        between = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self.text_end: int = next(token for token in between if token is not None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Without a beginning of text."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """By the stored template. Raises TokenizerError where there is none, or it refuses."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise TokenizerError(
                f"{self._directory}: its chat format has no place for this ({error}); "
                "--style letter and --style answer need none"
            ) from error

    def answer(self, text: str) -> list[int]:
        """Alone, for it stands at the beginning of a line."""
        return self.encode_batch([text])[0]
