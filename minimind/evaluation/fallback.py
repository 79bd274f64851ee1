"""Models that are not ours to read, by transformers: the one place that knows it, an extra.

They are slower, for nothing that questions begin with is shared; figures are the same kind.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.errors import ModelError, TokenizerError
from minimind.evaluation.models import fingerprint, name_of
from minimind.evaluation.scoring import Row, Scorer
from minimind.evaluation.words import Words
from minimind.model.cache import KVCache
from minimind.model.device import choose_device
from minimind.tokenizer.chat import Message

_AT_ONCE = 8  # answers


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
        self._model = model.to(chosen).eval()

    def identity(self) -> dict[str, Any]:
        """What results depend on."""
        return {
            "model": fingerprint(self.directory),
            "adapter": None,
            "context": self.context,
            "by": "transformers",
        }

    def scorer(self) -> tuple[Scorer, Words]:
        """Likelihoods in float32."""
        return _Scorer(self._model, self.context), _Words(self._tokenizer, self.directory)

    def answers(
        self, questions: Sequence[str], max_new_tokens: int
    ) -> Iterator[tuple[int, str | Exception]]:
        """Greedy answers, a few at once, those of one length together."""
        words = _Words(self._tokenizer, self.directory)
        prompts = [words.prompt([{"role": "user", "content": q}]) for q in questions]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        while order:
            length = len(prompts[order[0]])
            some = [place for place in order[:_AT_ONCE] if len(prompts[place]) == length]
            order = order[len(some) :]
            tokens = torch.tensor([prompts[place] for place in some], device=self._model.device)
            with torch.inference_mode():
                written = self._model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=words.text_end,
                )
            for place, ids in zip(some, written[:, length:].tolist(), strict=True):
                yield place, self._tokenizer.decode(ids, skip_special_tokens=True).strip()


class _Scorer(Scorer):
    """The same arithmetic over another model's logits, which are made for all tokens."""

    def __init__(self, model: Any, context: int | None) -> None:
        longest = getattr(model.config, "max_position_embeddings", None) or 2048
        self._their = model
        self.context = min(context or longest, longest)
        self._device = model.device
        self._vocab_size = model.config.vocab_size

    def _depends_on_length(self, length: int) -> bool:
        return False

    def _shared(self, rows: Sequence[Row]) -> tuple[KVCache | None, int]:
        return None, 0

    def _hidden(
        self, batch: Sequence[tuple[int, ...]], prefix: int, cache: KVCache | None
    ) -> Tensor:
        width = len(batch[0])
        tokens = self._tensor([[*read, *[0] * (width - len(read))] for read in batch])
        return self._their(tokens, use_cache=False).logits

    def _logits(self, hidden: Tensor) -> Tensor:
        return hidden


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
