"""Public Python API: load models, chat, generate, score, train and evaluate."""

import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

from minimind.config import Recipe, dump_recipe, load_recipe
from minimind.config.model import RopeKind
from minimind.errors import UsageError
from minimind.evaluation.bits_per_byte import measure_texts
from minimind.evaluation.catalogue import check_data, make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.scoring import Row
from minimind.inference.defaults import read_generation_defaults
from minimind.inference.engine import Engine
from minimind.inference.generate import sampler
from minimind.inference.load import load_for_inference
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.inference.truncation import truncate_chat
from minimind.progress import RichReporter
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import Message, validate_messages
from minimind.training.reporter import Reporter
from minimind.training.stage import run_stage

__all__ = ["Model", "Recipe", "RunResult", "Tokenizer", "evaluate", "load", "train"]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    adapter: str | Path | None = None,
    context: int | None = None,
    rope_scaling: RopeKind | None = None,
    int8: bool = False,
) -> "Model":
    """Load a model or run directory, optionally with a LoRA adapter.

    device: auto, cpu, cuda, cuda:1 or mps. context: context length in tokens; beyond the trained
    length, RoPE scaling is used: `rope_scaling` is linear, dynamic or yarn. int8: 8-bit weights on
    a CPU. Raises ModelError, TokenizerError and ResourceError.
    """
    return Model(
        Path(path),
        device=device,
        adapter=None if adapter is None else Path(adapter),
        context=context,
        rope_scaling=rope_scaling,
        int8=int8,
    )


class Model:
    """A loaded model. Close it, or use it in a `with` block, to free its KV cache."""

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        adapter: Path | None,
        context: int | None,
        rope_scaling: RopeKind | None,
        int8: bool,
    ) -> None:
        model, self.tokenizer = load_for_inference(
            path, device, adapter=adapter, context=context, rope_scaling=rope_scaling
        )
        self._defaults = read_generation_defaults(path)
        self._engine = Engine(model, self.tokenizer, context=context, int8=int8)
        # A float32 copy for scores, as in `minimind eval`; loaded on first use.
        self._local = LocalModel(
            path, device, adapter=adapter, context=context, rope_scaling=rope_scaling
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt and its continuation together."""
        return self._engine.context

    def close(self) -> None:
        """Stop generating and free the KV cache."""
        self._engine.close()

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False] = False,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        **sampling: float,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True],
        max_new_tokens: int | None = None,
        seed: int | None = None,
        **sampling: float,
    ) -> Generator[str]: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: bool = False,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        **sampling: float,
    ) -> str | Generator[str]:
        """Return the assistant's next message, or a generator of its pieces with `stream`.

        messages: a question, or a conversation as a list of {"role", "content"}. The oldest turns
        are dropped when the conversation exceeds the context. sampling: temperature, top_p,
        top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty; the model's own
        defaults otherwise. Raises UsageError for invalid settings or messages.
        """
        turns: Sequence[Message] = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        )
        try:
            validate_messages(turns)
        except ValueError as error:
            raise UsageError(str(error)) from None
        new_tokens = self._max_new_tokens(max_new_tokens)
        reserved = min(new_tokens, self.context // 4)  # tokens kept free for the answer
        prompt, _ = truncate_chat(self.tokenizer, list(turns), self.context - reserved)
        pieces = self._engine.stream_text(
            prompt, max_new_tokens=new_tokens, sampling=self._sampling(sampling), seed=seed
        )
        return pieces if stream else "".join(pieces).strip()

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **sampling: float,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **sampling: float,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **sampling: float,
    ) -> str | list[str]:
        """Return the continuation of each prompt; several prompts are decoded as one batch.

        Prompts are plain text, without the chat format. stop: one or more strings that end a
        continuation and are not part of it. sampling: as in `chat`. Raises UsageError.
        """
        if isinstance(prompt, str):
            [text] = self.generate(
                [prompt], max_new_tokens=max_new_tokens, stop=stop, seed=seed, **sampling
            )
            return text
        requests = [
            Request(
                self.tokenizer.text_start + self.tokenizer.encode(text),
                self._sampling(sampling),
                self._max_new_tokens(max_new_tokens),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_ids=frozenset(self.tokenizer.stop_ids),
                seed=seed,
            )
            for text in prompt
        ]
        texts = [""] * len(requests)
        for index, generated in self._engine.generate(requests):
            if generated.error is not None:
                raise generated.error
            texts[index] = generated.text
        return texts

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each continuation given the prompt, in nats.

        Each is the sum over the tokens of the continuation, computed in float32. Raises UsageError
        if a continuation is empty or exceeds the context.
        """
        if isinstance(continuations, str):
            raise UsageError("continuations is one string; give a list of strings")
        scorer, encoder = self._local.scorer()
        prefix = [*encoder.text_start, *(encoder.encode_batch([prompt])[0] if prompt else [])]
        prefix = prefix or [encoder.text_end]
        rows = []
        for ids, text in zip(encoder.encode_batch(list(continuations)), continuations, strict=True):
            if not ids:
                raise UsageError("a continuation is empty; give text to score")
            if len(prefix) + len(ids) > scorer.context + 1:
                raise UsageError(
                    f"the prompt and the continuation {text[:20]!r} have "
                    f"{len(prefix) + len(ids):,} tokens together, which exceeds the context of "
                    f"{scorer.context:,}; shorten them"
                )
            rows.append(Row((*prefix, *ids), len(prefix)))
        [(_, scores)] = scorer.score([(None, rows)])
        if isinstance(scores, Exception):
            raise scores
        return scores

    def bits_per_byte(self, texts: str | Sequence[str]) -> float:
        """Return the bits per byte of texts: total cross-entropy in bits per UTF-8 byte.

        Lower is better, and comparable across tokenizers. Raises UsageError if all texts are
        empty.
        """
        return measure_texts(self._local, texts)

    def _max_new_tokens(self, requested: int | None) -> int:
        if requested is not None:
            return requested
        return self._defaults.max_new_tokens or min(512, self.context // 2)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        try:
            return self._defaults.sampling_with(settings)
        except TypeError as error:
            raise UsageError(f"sampling: {error}") from error


@dataclass(frozen=True)
class RunResult:
    """The outcome of a training stage.

    run: the run directory. model: the model or adapter directory; None if the stage was
    interrupted, in which case the same call resumes it. summary: the content of `summary.json`.
    """

    run: Path
    model: Path | None
    summary: dict[str, Any]

    @property
    def finished(self) -> bool:
        """True if the stage reached its last step."""
        return self.model is not None


def train(
    recipe: str | Path | Recipe, *, fresh: bool = False, quiet: bool = False, **overrides: Any
) -> RunResult:
    """Train one stage: the pretraining, fine-tuning, LoRA or DPO run that a recipe describes.

    recipe: a TOML file, the name of a packaged recipe ("pretrain-small"), or a Recipe. overrides:
    settings by name, with "__" for the dot, such as `training__steps=100` or `out="out/run"`.
    An interrupted run in `out` is resumed. Ctrl-C saves a checkpoint and returns; a second
    one raises KeyboardInterrupt. fresh: discard the previous run. Raises MinimindError.
    """
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    if isinstance(recipe, Recipe):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.toml"
            file.write_text(dump_recipe(recipe), encoding="utf-8")
            resolved = load_recipe(file, flags=settings).recipe
    else:
        resolved = load_recipe(recipe, flags=settings).recipe
    reporter = Reporter() if quiet else RichReporter()
    samples = sampler(resolved, reporter.say)
    result = run_stage(resolved, reporter=reporter, fresh=fresh, generate_samples=samples)
    return RunResult(result.run, result.model or result.adapter, result.summary)


def evaluate(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    data: str | Sequence[str] = (),
    limit: int | None = None,
    device: str = "auto",
    adapter: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model or run directory; return the metrics of each task by its name.

    tasks: names as in `minimind eval --task`, without those of lm-eval: "bpb:held-out.jsonl",
    "ceval", "quiz"… data: folders or files with the questions. limit: evaluate an evenly spaced
    subset of this many questions.
    Writes no files; `minimind eval` also saves every answer. Raises UsageError and DataError.
    """
    names = [tasks] if isinstance(tasks, str) else tasks
    data = [data] if isinstance(data, str) else data
    for name in names:
        if name.startswith("lm-eval:"):
            raise UsageError(
                f"{name}: tasks of lm-eval need the command: minimind eval MODEL --task {name}"
            )
    check_data(names, data)
    local = LocalModel(Path(model), device, adapter=None if adapter is None else Path(adapter))
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        task = make_task(name, data=data, limit=limit)
        results = list(task.run(local, {}))
        failed = [result for result in results if "error" in result]
        summary = task.summary([result for result in results if "error" not in result])
        metrics[name] = summary | {"failed": len(failed)}
    return metrics
