"""Errors that end one request, and errors that stop the engine."""

NON_FINITE = (
    "the model's logits are not finite: its weights are damaged, or its training diverged. "
    "Use another checkpoint, or copy the model again"
)


def describe_error(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, on one line."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def as_exception(error: BaseException) -> Exception:
    """Return the error itself, or a RuntimeError for a BaseException such as a panic in Rust."""
    return error if isinstance(error, Exception) else RuntimeError(describe_error(error))
