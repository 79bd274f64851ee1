"""Admission control: a bounded queue per model."""

import math

from minimind.serving.errors import APIError


class AdmissionQueue:
    """Counts the running and queued answers of one model. Used only in the event loop."""

    def __init__(self, slots: int, max_queued: int) -> None:
        """`slots` answers run concurrently, up to `max_queued` more may wait."""
        self._slots = slots
        self._capacity = slots + max_queued
        self._admitted = 0
        self._mean_seconds = 1.0  # exponential moving average of the time per answer

    @property
    def capacity(self) -> int:
        """Number of answers that may run and wait."""
        return self._capacity

    @property
    def queued(self) -> int:
        """Number of answers that wait for a slot."""
        return max(self._admitted - self._slots, 0)

    def admit(self, answers: int) -> None:
        """Admit answers. Raise APIError 429 if the queue is full, 400 if they can never fit."""
        if answers > self._capacity:
            raise APIError(
                "invalid_value",
                f"The request needs {answers} answers, and this service takes at most "
                f"{self._capacity} at a time. Lower 'n' or send fewer prompts.",
                param="n",
            )
        # --8<-- [start:queue-full]
        if self._admitted + answers > self._capacity:
            wait = math.ceil(self._mean_seconds * (self.queued + 1) / self._slots)
            raise APIError(
                "queue_full",
                "The queue is full. Retry later.",
                headers={"retry-after": str(min(max(wait, 1), 60))},
            )
        self._admitted += answers
        # --8<-- [end:queue-full]

    def release(self, seconds: float) -> None:
        """Release one answer, which ended `seconds` after its admission."""
        self._admitted -= 1
        assert self._admitted >= 0
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
