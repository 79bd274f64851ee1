"""Rotary position embedding (Su et al. 2021, RoFormer), in Hugging Face's "rotate half" layout."""

import torch
from torch import Tensor


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles' cosines and sines for positions 0..length-1: [2, length, head_dim], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    angles = torch.arange(length).float()[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).to(device)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) by its position's angle; cos, sin: [B or 1, T, 1, D]."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos + torch.cat((-second, first), dim=-1) * sin
