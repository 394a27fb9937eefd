"""Kernelized convex masking (Nova et al., arXiv 2303.04185): how little each row of a matrix is like the others."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ROUNDS = 1000


def representativeness(rows: Tensor, width: float, tolerance: float) -> Tensor:
    """[n] float32 in [0, 1]: how much of each row is made of itself, when all rows are made of non-negative shares of
    all others in the feature space of a Gaussian kernel.

    With K_ij = exp(-|f_i - f_j|^2 / (width^2 m)), m the mean of |f_i - f_j|^2 over all i and j, the shares C, all 1 / n
    at first, are multiplied by sqrt(K_ij / (K C)_ij), until their sum changes by less than ``tolerance`` times itself;
    then the diagonal of C is read. (Rounds without end would end in the identity: those that are early there count.)

    Three [n, n] float32 matrices, and a product of two for each round.

    Args:
        rows: [n, d] float.
    """
    rows = rows.float()
    distances = torch.cdist(rows, rows).square()
    mean = distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)
    kernel = distances.div_(-(width**2) * mean).exp_()
    shares = torch.full_like(kernel, 1 / len(rows))
    for _ in range(_MAX_ROUNDS):
        before = shares.sum()
        shares = shares * (kernel / (kernel @ shares)).sqrt_()
        change = (shares.sum() - before).abs() / before
        if not bool(change >= tolerance):
            break
    return shares.diagonal().clone()
