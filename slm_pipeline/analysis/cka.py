"""Centred kernel alignment (CKA): how alike two layers' pictures of the same samples are, whatever basis they use.

    CKA(X, Y) = HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M)),    K and M the Gram matrices of X and Y

(Kornblith et al., arXiv 1905.00414). Many samples are taken in minibatches whose HSICs are added up and divided at the
end (Nguyen et al., arXiv 2010.15327), so that no Gram matrix of all samples is made. All arithmetic is in float64.

The code published with SLM (arXiv 2502.19159) computes something else, which is here as ``official``: see `hsic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slm_pipeline.errors import UserError
from slm_pipeline.machine.ranks import Share

KERNELS = ("linear", "rbf")
LEAST_ROWS = {"unbiased": 4, "biased": 2, "official": 4}  # by estimator: fewer leave it undefined
ESTIMATORS = tuple(LEAST_ROWS)


def gram(rows: Tensor, kernel: str = "linear", bandwidth_factor: float = 1.0) -> Tensor:
    """Kernel of every two rows.

    Args:
        rows: [n, features], any floating dtype.
        kernel: ``linear``: x.y; ``rbf``: exp(-|x - y|^2 / (2 s^2)), where the bandwidth s is ``bandwidth_factor``
            times the median of the distances |x - y| of all pairs of different rows of this very tensor, the lower of
            the two middle ones if their number is even (Kornblith et al., section 4, take a fraction of it too).

    Returns:
        [n, n] float64.
    """
    rows = rows.double()
    products = rows @ rows.T
    if kernel == "linear":
        return products
    squares = products.diagonal()
    squared = (squares[:, None] + squares - 2 * products).clamp_min(0).fill_diagonal_(0)
    above = torch.ones_like(squared, dtype=torch.bool).triu(diagonal=1)
    bandwidth = bandwidth_factor * squared[above].median().sqrt()
    return (-squared / (2 * bandwidth.square()).clamp_min(torch.finfo(torch.float64).tiny)).exp()


def hsic(grams: Tensor, estimator: str = "unbiased") -> Tensor:
    """Hilbert-Schmidt independence criterion of every two Gram matrices.

    Args:
        grams: [S, n, n] float64, symmetric, all of the same n samples.
        estimator: what is computed of two of them, K and M.
            ``unbiased``: with zeroed diagonals and no centring (Song et al., JMLR 13 (2012), equation 5)
            [tr(KM) + (1'K1)(1'M1) / ((n-1)(n-2)) - 2 (1'KM1) / (n-2)] / (n(n-3)); 0 on average for independent samples.
            ``biased``: tr(HKHM) / (n-1)^2, H = I - 11'/n (Gretton et al., ALT 2005). Positive even for independent
            samples; with more features than samples its CKA is near 1 whatever they are.
            ``official``: what SLM's code computes and calls unbiased: the three terms above, but of HKH and HMH with
            their diagonals. Two of the terms are then 0, which leaves the biased one up to scale; and each value is
            cut to an integer, which matters when activations are small.

    Returns:
        [S, S] float64.

    Raises:
        UserError: fewer samples than the estimator is defined for.
    """
    n = grams.shape[-1]
    if n < LEAST_ROWS[estimator]:
        raise UserError(f"the {estimator} estimator of HSIC needs at least {LEAST_ROWS[estimator]} rows, not {n}")
    if estimator == "unbiased":
        return _three_terms(grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1)))
    means = grams.mean(dim=-1, keepdim=True)
    centred = grams - means - means.mT + means.mean(dim=-2, keepdim=True)
    if estimator == "biased":
        return _traces(centred) / (n - 1) ** 2
    return _three_terms(centred).trunc()


def _three_terms(grams: Tensor) -> Tensor:
    n = grams.shape[-1]
    sums = grams.sum(dim=-1)
    totals = sums.sum(dim=-1)
    corrections = torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 * sums @ sums.T / (n - 2)
    return (_traces(grams) + corrections) / (n * (n - 3))


def _traces(grams: Tensor) -> Tensor:
    """tr(KM) of every two symmetric matrices."""
    flat = grams.flatten(start_dim=1)
    return flat @ flat.T


def alignment(hsics: Tensor) -> Tensor:
    """CKA from the HSICs of every two: [S, S] -> [S, S]; NaN where a layer's own HSIC is not positive."""
    own = hsics.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    return hsics / (scale[:, None] * scale)


def cka(
    x: Tensor, y: Tensor, estimator: str = "unbiased", kernel: str = "linear", bandwidth_factor: float = 1.0
) -> float:
    """CKA of two representations ([n, features] and [n, other features]) of the same n samples, in one batch."""
    grams = torch.stack([gram(rows, kernel, bandwidth_factor) for rows in (x, y)])
    return float(alignment(hsic(grams, estimator))[0, 1])


@dataclass
class MinibatchCKA:
    """CKA of every two of S representations, from rows that arrive bit by bit.

    The rows are cut into minibatches in the order in which they arrive, each of ``minibatch`` rows but the last, which
    takes what is left too; so none has fewer, unless there are fewer in all, and no row is left out.

    Attributes:
        minibatch: rows of a minibatch; at least 64 is advisable.
        estimator, kernel, bandwidth_factor: see `hsic` and `gram`. A bandwidth is that of one minibatch and layer.
        num_rows: rows seen so far.
        num_minibatches: whose HSICs are in the sum so far.
    """

    minibatch: int
    estimator: str = "unbiased"
    kernel: str = "linear"
    bandwidth_factor: float = 1.0
    num_rows: int = field(default=0, init=False)
    num_minibatches: int = field(default=0, init=False)
    _hsics: Tensor | None = field(default=None, init=False, repr=False)
    _waiting: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def add(self, states: Sequence[Tensor]) -> None:
        """Take in the same samples' rows in each of the S representations: [rows, features of that one] each."""
        self.num_rows += len(states[0])
        if self._waiting:
            states = [torch.cat(pair) for pair in zip(self._waiting, states, strict=True)]
        while len(states[0]) >= 2 * self.minibatch:
            self._take([rows[: self.minibatch] for rows in states])
            states = [rows[self.minibatch :] for rows in states]
        self._waiting = [rows.clone() for rows in states]  # a view would keep all of the batch alive

    def _take(self, states: Sequence[Tensor]) -> None:
        device = states[0].device  # a model's layers may be on several
        grams = torch.stack([gram(rows, self.kernel, self.bandwidth_factor).to(device) for rows in states])
        found = hsic(grams, self.estimator).cpu()
        self._hsics = found if self._hsics is None else self._hsics + found
        self.num_minibatches += 1

    def gather(self, share: Share) -> None:
        """Add what other processes have taken in; but in the last, whole minibatches alone."""
        if share.divided:
            self._flush()
            assert self._hsics is not None
            counts = share.summed(torch.tensor([self.num_rows, self.num_minibatches]))
            self.num_rows, self.num_minibatches = counts.tolist()
            self._hsics = share.summed(self._hsics)

    def result(self) -> Tensor:
        """[S, S] float64 on the CPU, NaN where undefined. More rows must not be added afterwards.

        Raises:
            UserError: fewer rows in all than the estimator needs.
        """
        self._flush()
        if self._hsics is None:
            raise UserError("CKA of no rows at all")
        return alignment(self._hsics)

    def _flush(self) -> None:
        if self._waiting:
            self._take(self._waiting)
            self._waiting = []
