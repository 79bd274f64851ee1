"""Row padding for matrix products: a workaround for oneDNN's kernel cache."""

_MULTIPLE = 64


def padding_to_multiple(num_rows: int) -> int:
    """Return the number of rows to add to `num_rows` to reach a multiple of 64.

    On a CPU, oneDNN caches about a megabyte per distinct number of rows, for up to a thousand of
    them. Without padding, a number that varies from call to call would make memory grow.
    """
    return -num_rows % _MULTIPLE
