"""Least squares for the last projection of a sublayer: which of its inputs to remove, and the best other weights.

Plain tensors, no model. Of a projection W [d, n] with inputs X [n, tokens] everything here needs the Gram matrix
G = X X' [n, n] alone; sums and solutions are float64. A penalty lam is in the units of G; `penalty` gives one in those
of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slm_pipeline.errors import UserError

_COLUMNS = 1024  # of a triangle's inverse at a time


class Gram:
    """X X' of a linear layer's inputs, summed while they stream.

    Products are float32, of as many tokens as are added at once, and added up in float64.

    Args:
        num_channels: n.
        device: where the [n, n] matrix is.
    """

    def __init__(self, num_channels: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Take in [..., n] inputs, each token's counted ``weights`` ([...], not negative) times; None: once."""
        rows = inputs.flatten(0, -2).float()
        left = rows if weights is None else rows * weights.flatten().to(rows)[:, None]
        with full_float32():
            self.matrix += (left.T @ rows).to(self.matrix.device)  # a GPU adds float32 as it is, with no copy
        self.num_tokens += len(rows)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products are exact meanwhile, whoever told torch to use TF32 for them."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def penalty(gram: Tensor, ridge: float) -> float:
    """``ridge`` times the mean of the Gram matrix's diagonal; a little more than 0 where all inputs are 0."""
    return max(ridge * float(gram.diagonal().mean()), 1e-30)


def solve(gram: Tensor, moment: Tensor, *, prior: Tensor | None = None, penalty: float = 0.0) -> Tensor:
    """argmin over W [d, n] of |W X - T|^2 + penalty |W - prior|^2, from sums over tokens.

    Args:
        gram: [n, n] X X'.
        moment: [d, n] T X', with the targets T [d, tokens].
        prior: [d, n] that the penalty draws W to; None: 0.
        penalty: lam, at least 0.

    Returns:
        (T X' + lam prior) (X X' + lam I)^-1, float64.

    Raises:
        UserError: X X' + lam I has no inverse.
    """
    right = moment.to(torch.float64, copy=True)
    if prior is not None:
        right += penalty * prior.to(right)
    factor = _factor(gram, penalty)
    for triangle, upper in ((factor, False), (factor.mT, True)):  # in place: torch.cholesky_solve copies both
        torch.linalg.solve_triangular(triangle, right.mT, upper=upper, out=right.mT)
    return right


def refit(weight: Tensor, gram: Tensor, kept: Tensor, *, penalty: float = 0.0) -> Tensor:
    """The best weights for the kept inputs alone, when the projection is to put out what it did: [d, kept] float64.

    The penalty draws them to those that they have, which makes this the optimum that exact updates of `removal_order`
    lead to: W H_:S H_SS^-1 with H = G + lam I.

    Args:
        weight: [d, n] of the projection.
        gram: [n, n] of all its inputs.
        kept: [kept] int64 columns.
    """
    weight, gram = weight.double(), gram.double()
    return solve(gram[kept][:, kept], weight @ gram[:, kept], prior=weight[:, kept], penalty=penalty)


def regret(weight: Tensor, gram: Tensor, kept: Tensor, found: Tensor, *, penalty: float) -> float:
    """What `refit` minimises: |W X - found X_S|^2 + penalty |W - found|^2, where ``found`` [d, kept] is 0 elsewhere."""
    change = weight.double().clone()
    change[:, kept] -= found.to(change)
    return float((change @ gram.double() * change).sum() + penalty * change.square().sum())


def best_refit(weight: Tensor, gram: Tensor, choices: Sequence[Tensor], *, penalty: float) -> tuple[int, Tensor]:
    """Of several choices of columns that may be kept the one whose `refit` has the least `regret`: which, and the
    weights."""
    fits = [refit(weight, gram, kept, penalty=penalty) for kept in choices]
    errors = [regret(weight, gram, kept, new, penalty=penalty) for kept, new in zip(choices, fits, strict=True)]
    best = errors.index(min(errors))
    return best, fits[best]


def order_by_norm(weight: Tensor, gram: Tensor, *, size: int = 1, fixed: Tensor | None = None) -> Tensor:
    """Blocks of columns by the energy that they write, |W_P X_P|^2, the lowest first; int64 on the CPU, without
    ``fixed`` ones."""
    number = len(gram) // size
    blocks = gram.double().view(number, size, number, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    of_block = weight.double().view(-1, number, size).transpose(0, 1)
    order = (blocks * (of_block.mT @ of_block)).sum(dim=(1, 2)).cpu().argsort(stable=True)
    return order if fixed is None else order[~fixed[order]]


def removal_order(
    weight: Tensor,
    gram: Tensor,
    remove: int,
    *,
    size: int = 1,
    penalty: float,
    at_a_time: int = 1,
    fixed: Tensor | None = None,
) -> Tensor:
    """The optimal brain surgeon on blocks of columns: which go, in order, the cheapest first.

    A block P costs tr(W_P ([H^-1]_PP)^-1 W_P'), H = G + penalty I: what the squared error of the outputs, and the
    penalty, grow by when it goes and all other columns make up for it as well as they can. After each removal W and
    H^-1 are those of what is left (Schur complement), so that the next costs are exact. Several blocks of one round are
    chosen by their costs one by one, and removed together.

    Args:
        weight: [d, n] of the projection.
        gram: [n, n] of its inputs.
        remove: blocks that are to go.
        size: columns of a block, which lie side by side; n is a multiple.
        at_a_time: blocks that go in a round.
        fixed: [n / size] bool: those that stay.

    Returns:
        [remove] int64 blocks on the CPU; any first part of it is the decision for that number.
    """
    left, inverse = weight.double().clone(), torch.cholesky_inverse(_factor(gram, penalty))
    device, number = left.device, len(gram) // size
    stays = torch.zeros(number, dtype=torch.bool, device=device) if fixed is None else fixed.to(device).clone()
    columns = torch.arange(len(gram), device=device).view(number, size)
    order: list[int] = []
    identity = torch.eye(size, dtype=torch.float64, device=device)
    while (missing := remove - len(order)) > 0:
        blocks = inverse.view(number, size, number, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        blocks = torch.where(stays[:, None, None], identity, blocks)  # what is gone has a block of zeros
        of_block = left.view(-1, number, size).permute(1, 2, 0)
        factors, failed = torch.linalg.cholesky_ex(blocks)  # not by LU: with threads MKL's fails on several at once
        costs = torch.linalg.solve_triangular(factors, of_block, upper=False).square().sum(dim=(1, 2))
        costs[failed > 0] = torch.finfo(costs.dtype).max  # by rounding: all but nothing of it is free of the others
        chosen = costs.masked_fill(stays, torch.inf).argsort(stable=True)[: min(at_a_time, missing)]
        stays[chosen] = True
        order += chosen.tolist()
        gone = columns[chosen].flatten()
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        left -= left[:, gone] @ update
        inverse -= inverse[:, gone] @ update
        left[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0  # but for rounding they are
    return torch.tensor(order, dtype=torch.int64)


def leverage_scores(gram: Tensor, *, penalty: float) -> Tensor:
    """[n] float64 ridge leverage scores, the diagonal of G (G + penalty I)^-1, each in [0, 1): the higher, the less a
    channel is a combination of the others."""
    factor, scores = _factor(gram, penalty), torch.empty(len(gram), dtype=torch.float64, device=gram.device)
    for start in range(0, len(gram), _COLUMNS):  # of the inverse's diagonal, as the columns' squares of the factor's
        columns = torch.zeros(len(gram), min(_COLUMNS, len(gram) - start), dtype=torch.float64, device=gram.device)
        columns[start:].fill_diagonal_(1.0)
        found = torch.linalg.solve_triangular(factor, columns, upper=False)
        scores[start : start + columns.shape[1]] = 1 - penalty * found.square().sum(dim=0)
    return scores


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of G + penalty I, in the place of its one copy: at 7B each of this size is a gigabyte."""
    factor = gram.to(torch.float64, copy=True).mT  # symmetric; LAPACK works in place where columns lie in one piece
    factor.diagonal().add_(penalty)
    _, failed = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty(0, dtype=torch.int32, device=gram.device)))
    if int(failed) or not bool(factor.diagonal().isfinite().all()):  # each sees its whole row
        what = "are linearly dependent; use a larger ridge" if is_finite(gram) else "are not finite"
        raise UserError(f"least squares: the inputs of a projection {what}")
    return factor


def is_finite(matrix: Tensor) -> bool:
    """Whether all entries are, by their sum, for which no copy is made; entries are far from what overflows."""
    return bool(matrix.sum().isfinite())
