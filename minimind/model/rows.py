"""Round numbers of rows for products of matrices."""

_ROUND = 64


def padding_to_multiple(count: int) -> int:
    """How many rows of zeros make `count` a round number.

    On a CPU oneDNN keeps about a megabyte for each number of rows that it meets, a thousand of
    them: where the number is another one each time, training would grow by that much a step.
    """
    return -count % _ROUND
