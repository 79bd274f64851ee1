"""Padding the number of rows of a matrix product, a workaround for oneDNN's kernel cache."""

_MULTIPLE = 64


def padding_to_multiple(num_rows: int) -> int:
    """Return how many rows of zeros pad `num_rows` to a multiple of 64.

    On a CPU, oneDNN caches a kernel of about a megabyte per distinct number of rows, up to a
    thousand of them. Where the number differs at each call, memory would grow at each step.
    """
    return -num_rows % _MULTIPLE
