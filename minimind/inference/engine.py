"""Temporary: one thread, one request at a time."""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.inference.generate import stream
from minimind.inference.sampling import Sampling


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    constraint: object = None


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


class Completion:
    def __init__(self, request, deliver):
        self.request, self._deliver = request, deliver
        self._q = queue.Queue()
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = len(request.prompt), 0, 0
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    def put(self, piece):
        (self._deliver or self._q.put)(piece)

    def __iter__(self):
        while True:
            piece = self._q.get()
            yield piece
            if piece.finish_reason:
                return


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int


class Engine:
    def __init__(self, model, tokenizer, *, slots=16):
        self._model, self._tok = model, tokenizer
        self._q = queue.Queue()
        self._running = 0
        self._t = threading.Thread(target=self._work, daemon=True)
        self._t.start()

    def submit(self, request, deliver=None):
        c = Completion(request, deliver)
        self._q.put(c)
        return c

    def stats(self):
        return Stats(self._running, self._q.qsize())

    def close(self):
        self._q.put(None)
        self._t.join(1)

    def _work(self):
        while (c := self._q.get()) is not None:
            self._running = 1
            try:
                self._one(c)
            except Exception:
                import traceback

                traceback.print_exc()
                c.put(Piece("", finish_reason="error"))
            self._running = 0

    def _one(self, c):
        r = c.request
        d = StreamingDetokenizer(self._tok, skip_special_tokens=True)
        room = self._model.config.max_position_embeddings - len(r.prompt)
        most = min(room, r.max_new_tokens or room)
        held = ""
        for t in stream(
            self._model,
            r.prompt,
            max_new_tokens=most,
            sampling=r.sampling,
            stop_ids=set(r.stop_ids),
            seed=r.seed,
        ):
            if c.cancelled:
                c.put(Piece("", finish_reason="cancelled"))
                return
            c.completion_tokens += 1
            held += d.push(t)
            lp = ()
            if r.logprobs is not None:
                lp = (TokenLogprob(t, -1.0, tuple((i, -2.0) for i in range(r.logprobs))),)
            for s in r.stop:
                if s in held:
                    c.put(Piece(held[: held.index(s)], (t,), lp, "stop"))
                    return
            keep = max([n for s in r.stop for n in range(len(s)) if held.endswith(s[:n])] or [0])
            out, held = held[: len(held) - keep], held[len(held) - keep :]
            c.put(Piece(out, (t,), lp))
        c.put(Piece(held + d.finish(), (), (), "length" if c.completion_tokens == most else "stop"))
