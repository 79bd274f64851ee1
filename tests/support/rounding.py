"""Tolerances between two float32 implementations, derived from the lengths of their sums.

A sum of n products, rounded after each operation in any order, has a relative error of at most
lambda * sqrt(n) * u, with probability 1 - 2 exp(-lambda^2 / 2) per rounding (Higham and Mary, "A
new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019, theorem
2.4); u = 2^-24 for float32. To first order the errors of sums that follow each other add up, and
each implementation may err in another direction. "Relative" means to the norm of the tensor: an
element may be small because large terms cancel, which does not make its error small.

The bound holds for any order of summation, so for any processor, kernel and number of threads.
"""

import math

from torch import Tensor

from minimind.model import ModelConfig

UNIT = 2.0**-24
LAMBDA = 4.0  # exceeded by one rounding in 1,500


def rounding(*lengths: float) -> float:
    """Bound the relative difference of two float32 results of consecutive sums of these lengths."""
    return 2 * LAMBDA * UNIT * sum(math.sqrt(length) for length in lengths)


def forward_sums(config: ModelConfig, positions: int) -> list[int]:
    """Return the lengths of the sums from the embedding to the logits.

    positions: keys that a query attends to at most.
    """
    hidden, width = config.hidden_size, config.head_dim
    inner = max(config.intermediate_size, config.shared_intermediate_size or 0)
    attention = [hidden, hidden, width, positions, positions, config.num_attention_heads * width]
    feed_forward = [hidden, hidden, inner]
    if config.num_local_experts:  # the router, its softmax, and the sum over the chosen experts
        feed_forward += [hidden, config.num_local_experts, config.num_experts_per_tok + 1]
    return config.num_hidden_layers * (attention + feed_forward) + [hidden, hidden]


def logits_rounding(config: ModelConfig, positions: int) -> float:
    """Bound the relative difference of the logits of two implementations."""
    return rounding(*forward_sums(config, positions))


def gradient_rounding(config: ModelConfig, positions: int, tokens: int) -> float:
    """Bound the relative difference of loss and gradient of two implementations.

    The backward pass has two products for each of the forward pass. Between both are the softmax
    over the vocabulary and its gradient; the gradient of a weight sums over the tokens.
    """
    forward = forward_sums(config, positions)
    return rounding(*forward * 3, config.vocab_size, config.vocab_size, tokens)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`."""
    x, y = actual.detach().double(), expected.detach().double()
    return float((x - y).norm() / y.norm())


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two elements, relative to the largest in `expected`."""
    x, y = actual.detach().double(), expected.detach().double()
    return float((x - y).abs().max() / y.abs().max())
