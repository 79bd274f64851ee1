"""Model directories made ready to be examined."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.errors import MinimindError
from minimind.evaluation.encoding import OwnPromptEncoder, PromptEncoder
from minimind.evaluation.scoring import EngineScorer, Scorer
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.engine import Engine
from minimind.inference.load import inference_dtype, load_for_inference
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.model import (
    Transformer,
    fingerprint,
    resolve_adapter_directory,
    resolve_model_directory,
)
from minimind.model.device import choose_device
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.version import __version__

_WARM_UP = 16  # tokens of an answer


class LocalModel:
    """A model or run directory. It is loaded when it is needed.

    For likelihoods in float32, so that figures depend neither on the device nor on what stands
    beside a question; to write in what the device is fastest in, as everywhere else.
    """

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        *,
        adapter: Path | None = None,
        context: int | None = None,
    ) -> None:
        """Raises ModelError for what is no model or no adapter."""
        self.directory = resolve_model_directory(path)
        self.name = name_of(path) + (f" + {name_of(adapter)}" if adapter else "")
        self.adapter, self.context = adapter, context
        self._device = device
        self._loaded: tuple[torch.dtype | None, Transformer, Tokenizer] | None = None

    def check(self) -> None:
        """Raises ModelError or TokenizerError when it is of a kind that we do not read."""
        self._load(torch.float32)

    def identity(self) -> dict[str, Any]:
        """Return all that results depend on beside the task."""
        adapter = resolve_adapter_directory(self.adapter) if self.adapter else None
        device = choose_device(self._device)
        return {
            "version": __version__,
            "model": fingerprint(self.directory),
            "adapter": fingerprint(adapter) if adapter else None,
            "context": self.context,
            "device": name_of_device(device),
            "dtype": str(inference_dtype(device)).removeprefix("torch."),  # of generated answers
        }

    def _load(self, dtype: torch.dtype | None) -> tuple[Transformer, Tokenizer]:
        if self._loaded is None or self._loaded[0] != dtype:
            self._loaded = None  # one at a time
            model, tokenizer = load_for_inference(
                self.directory,
                self._device,
                adapter=self.adapter,
                dtype=dtype,
                context=self.context,
            )
            self._loaded = dtype, model, tokenizer
        return self._loaded[1], self._loaded[2]

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """In float32. With a --context below the model's own, windows are that long."""
        model, tokenizer = self._load(torch.float32)
        return EngineScorer(model, tokenizer, self.context), OwnPromptEncoder(tokenizer)

    def answers(
        self, questions: Sequence[str], manner: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Each in a conversation of its own, as they end."""
        model, tokenizer = self._load(None)
        prompts: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            asked = [{"role": "user", "content": question}]
            try:
                prompts[number] = encode_chat(tokenizer, asked, add_generation_prompt=True)[0]
            except MinimindError as error:
                yield number, error
        if not prompts:
            return
        longest = max(map(len, prompts.values())) + manner.max_new_tokens
        context = min(longest, self.context or longest)
        sampling = Sampling(manner.temperature, manner.top_p)
        slots = min(manner.at_once, len(prompts))
        with Engine(model, tokenizer, max_slots=slots, context=context) as engine:
            _warm_up(engine, list(prompts.values())[:slots])
            requests = [
                Request(
                    prompt,
                    sampling,
                    manner.max_new_tokens,
                    stop_ids=frozenset(tokenizer.stop_ids),
                    seed=manner.seed_of(questions[number]),
                )
                for number, prompt in prompts.items()
            ]
            numbers = list(prompts)
            before = time.perf_counter()
            for index, generated in engine.generate(requests):
                now = time.perf_counter()
                yield (
                    numbers[index],
                    generated.error
                    or Answer(
                        generated.text.strip(),
                        len(generated.token_ids),
                        generated.finish_reason == "stop",
                        now - before,
                    ),
                )
                before = now


def _warm_up(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Write a few words, so that speed is not that of first steps, which take far longer."""
    # Without their first token, so that nothing of the prompts themselves is kept for later.
    fitting = [prompt[1:] for prompt in prompts if 1 < len(prompt) < engine.context]
    requests = [Request(prompt, Sampling(temperature=0), _WARM_UP) for prompt in fitting]
    for _ in engine.generate(requests):
        pass


def name_of(path: Path) -> str:
    """What a model is called: its directory, or the run's whose model it is."""
    parts = [part for part in path.resolve().parts if part not in ("model", "adapter")]
    return parts[-1]


def name_of_device(device: torch.device) -> str:
    """Return the kind of a device, of a GPU the name of its model, which results depend on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
