"""Local models under evaluation."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.config.model import RopeKind
from minimind.errors import MinimindError
from minimind.evaluation.encoding import MinimindEncoder, PromptEncoder
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
from minimind.tokenizer.chat import Message
from minimind.version import __version__

_WARM_UP_TOKENS = 16  # per prompt


class LocalModel:
    """A model or run directory, loaded on first use.

    Log-likelihoods are computed in float32, so that they do not depend on the device or the batch.
    Answers are generated in the device's fastest dtype.
    """

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        *,
        adapter: Path | None = None,
        context: int | None = None,
        rope_scaling: RopeKind | None = None,
    ) -> None:
        """Resolve the paths. Raises ModelError if one is not a model or an adapter."""
        self.directory = resolve_model_directory(path)
        self.name = name_of(path) + (f" + {name_of(adapter)}" if adapter else "")
        self.adapter, self.context = adapter, context
        self._rope_scaling = rope_scaling
        self._device = device
        self._loaded: tuple[torch.dtype | None, Transformer, Tokenizer] | None = None

    def check(self) -> None:
        """Load the model. Raises ModelError or TokenizerError if it is not supported."""
        self._load(torch.float32)

    def identity(self) -> dict[str, Any]:
        """Return everything that results depend on besides the task."""
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
            self._loaded = None  # free the other dtype first
            model, tokenizer = load_for_inference(
                self.directory,
                self._device,
                adapter=self.adapter,
                dtype=dtype,
                context=self.context,
                rope_scaling=self._rope_scaling,
            )
            self._loaded = dtype, model, tokenizer
        return self._loaded[1], self._loaded[2]

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """Return a float32 scorer, limited to the context if one is given."""
        model, tokenizer = self._load(torch.float32)
        return EngineScorer(model, tokenizer, self.context), MinimindEncoder(tokenizer)

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Answer conversations; see Model."""
        model, tokenizer = self._load(None)
        prompts: dict[int, list[int]] = {}
        for index, messages in enumerate(conversations):
            try:
                prompts[index] = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
            except MinimindError as error:
                yield index, error
        if not prompts:
            return
        longest = max(map(len, prompts.values())) + generation.max_new_tokens
        context = min(longest, self.context or longest)
        sampling = Sampling(generation.temperature, generation.top_p)
        slots = min(generation.concurrency, len(prompts))
        with Engine(model, tokenizer, max_slots=slots, context=context) as engine:
            _warm_up(engine, list(prompts.values())[:slots])
            requests = [
                Request(
                    prompt,
                    sampling,
                    generation.max_new_tokens,
                    stop_ids=frozenset(tokenizer.stop_ids),
                    seed=generation.seed_for(conversations[index]),
                )
                for index, prompt in prompts.items()
            ]
            indices = list(prompts)
            before = time.perf_counter()
            for number, generated in engine.generate(requests):
                now = time.perf_counter()
                yield (
                    indices[number],
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
    """Generate a few tokens, because the first steps are far slower than all later ones."""
    # Without the first token, so that the prefix cache does not hold the prompts themselves.
    shortened = [prompt[1:] for prompt in prompts if 1 < len(prompt) < engine.context]
    requests = [Request(prompt, Sampling(temperature=0), _WARM_UP_TOKENS) for prompt in shortened]
    for _ in engine.generate(requests):
        pass


def name_of(path: Path) -> str:
    """Return the name of a model: that of its run directory, or of its own directory."""
    parts = [part for part in path.resolve().parts if part not in ("model", "adapter")]
    return parts[-1]


def name_of_device(device: torch.device) -> str:
    """Return the GPU's model name, or the device type for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
