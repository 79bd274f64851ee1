"""Reading of a streamed answer in a thread, while the page script renders the text so far."""

import threading
import time
from typing import Any

from minimind.errors import ServiceError
from minimind.web.client import Answer as StreamedAnswer
from minimind.web.client import Client, ModelInfo
from minimind.web.store import Answer


class StreamReader:
    """Reads one answer in its own thread, so that two models can stream concurrently."""

    def __init__(
        self,
        client: Client,
        model: ModelInfo,
        messages: list[dict[str, str]],
        settings: dict[str, Any],
    ) -> None:
        self._client, self._model = client, model
        self._messages, self._settings = messages, settings
        self._answer = Answer(model.name)
        self._pieces: list[str] = []
        self._stream: StreamedAnswer | None = None
        self._closed = False
        self.is_streaming = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        start_time = time.monotonic()
        try:
            self._stream = self._client.chat(self._model, self._messages, **self._settings)
            self._answer.left_out = self._stream.left_out
            if self._closed:  # closed while the request was being sent
                self._stream.abort()
            for piece in self._stream:
                self._pieces.append(piece)
                self._answer.seconds = time.monotonic() - start_time
            self._answer.finish_reason = None if self._closed else self._stream.finish_reason
        except ServiceError as error:
            if not self._closed:
                self._answer.error = str(error)
        finally:
            if self._stream is not None:
                self._stream.close()
            self.is_streaming = False

    def answer(self) -> Answer:
        """Return the answer so far."""
        self._answer.text = "".join(self._pieces)
        # The service reports its token count at the end; until then, one piece is about one token.
        tokens = self._stream.tokens if self._stream is not None else None
        self._answer.tokens = len(self._pieces) if tokens is None else tokens
        return self._answer

    def close(self) -> None:
        """Cancel generation, or remove the request from the service's queue."""
        self._closed = True
        if self._stream is not None:
            self._stream.abort()
