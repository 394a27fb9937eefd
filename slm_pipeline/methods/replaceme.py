"""ReplaceMe: remove the contiguous block whose ends are closest, and put a linear map in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.config.ranges import Count, NotNegative, Positive, Share
from slm_pipeline.errors import UserError
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.target import Layers
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.fold import Fold
from slm_pipeline.surgery.plan import Plan, format_fit

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes

SOLVERS = ("least_squares", "cosine")
RIDGE_TARGETS = ("zero", "identity")
TOKENS_PER_CHANNEL = 8  # fewer to a map of d x d numbers, and it fits them and little else


@dataclass(kw_only=True)
class ReplaceMe(AngularDistance):
    """ReplaceMe, arXiv 2505.02819. The block is that of ``angular``; nothing is added to the model.

    Let layers s .. e - 1 go, m be the output of the feed-forward network of layer s - 1 and h_s, h_e the residual
    stream that enters layers s and e, as rows, one for each calibration token. The map T with
    m T + (h_s - m) ~ h_e is folded into the last projection of that network, so the checkpoint is a stock one.

    Departures from the published code: no padding tokens in the fit, because calibration text has none; some samples
    are held out of it, to tell what the map does to text that it was not fitted to; the forward pass ends at layer e;
    least squares keeps two d x d matrices instead of all activations, and has a ridge in units of the data's own scale;
    refused for architectures that put a norm after the projection, where folding is wrong. One block only; the
    published code can cut several. The published text is 8000 chat samples of SlimOrca, of at most 1024 tokens.

    Scores in the plan: distances as for ``angular``; fit, for the tokens fitted and those held_out (absent where none
    are) num_tokens, and cosine_before and cosine_after, their means of cos(h_s, h_e) and of cos(m T + h_s - m, h_e);
    warnings, if there were fewer than 8 tokens for each of the d channels.
    """

    # Share of the samples that the map is not fitted to, at least one (of a single sample its last tokens); 0, as
    # published, measures nothing but the fit.
    held_out: Share = 0.1
    # least_squares | cosine: closed form, float64; or the mean of cos(m T, h_e - h_s + m) maximised with Adam from
    # T = 1, which keeps two [tokens, d] matrices in the model's dtype on its device, twice that while they are made.
    solver: str = "least_squares"
    ridge: NotNegative = 0.0  # least_squares: penalty on T, or T - 1, relative to the mean square of m; 0 as published
    # least_squares: zero | identity: what the penalty draws T to. The identity, ours, removes the block and changes
    # nothing else.
    ridge_target: str = "zero"
    accurate: bool = False  # cosine: maximise cos(m T + h_s - m, h_e) instead; keeps a third matrix
    learning_rate: Positive = 1e-4  # cosine: of Adam, as published
    num_epochs: Count = 10  # cosine: as published
    batch_tokens: Count = 1024  # cosine: as published

    name: ClassVar[str] = "replaceme"
    streams: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect_first < 1:
            raise UserError(f"method.protect_first={self.protect_first} must be at least 1: a layer must be left below")
        for option, allowed in (("solver", SOLVERS), ("ridge_target", RIDGE_TARGETS)):
            if getattr(self, option) not in allowed:
                raise UserError(f"method.{option}={getattr(self, option)!r} is not one of {', '.join(allowed)}")
        if self.solver == "least_squares":
            unused = ("accurate", "learning_rate", "num_epochs", "batch_tokens")
            self.refuse_unused("with method.solver=least_squares", *unused)
        else:
            self.refuse_unused("with method.solver=cosine", "ridge", "ridge_target")
        if self.ridge == 0:
            self.refuse_unused("with method.ridge=0", "ridge_target")

    def check(self, context: Context) -> None:
        super().check(context)
        source = context.source
        if source.architecture.output_norms:
            raise UserError(
                f"method=replaceme: in {source.name} a norm follows the last projection of the feed-forward network, so"
                " a linear map cannot be folded into it"
            )

    def memory(self, sizes: Sizes) -> int:
        """Two matrices of sums in float64, and three more to invert one; or what enters and leaves the map of all
        tokens, twice while it is put together."""
        rows = sizes.running(sizes.batch_tokens(2048)) + sizes.states(sizes.batch_tokens(2048), 6)
        if self.solver == "least_squares":
            return rows + 5 * 8 * sizes.hidden**2
        return rows + 2 * sizes.states(sizes.tokens, 3 if self.accurate else 2) + 16 * sizes.hidden**2

    def plan(self, problem: PruningProblem[Layers]) -> Plan:
        import torch

        removed, distances = self.closest_ends(problem.statistics.angle_last, problem.target.remove)
        if self.solver == "least_squares":
            transform = self._least_squares(problem, removed)
        else:
            transform = self._most_alike(problem, removed)
        if not bool(torch.isfinite(transform).all()):
            raise UserError(
                "method=replaceme: the linear map is not finite; try model.dtype=float32 or method.ridge=1e-4"
            )
        fit, warnings = self._fit(problem, removed, transform)
        return self.new_plan(
            problem,
            ops=[Drop(tuple(removed)), Fold((removed[0] - 1,), "fold.0")],
            tensors={"fold.0": transform.float().cpu().numpy()},
            scores={
                "order": removed,
                "distances": distances,
                "fit": fit,
                **({"warnings": warnings} if warnings else {}),
            },
        )

    def _rows(
        self, problem: PruningProblem, removed: list[int], *, held_out: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """m, h_s and h_e of the tokens fitted, or held out, of one batch of samples after the other, [tokens, d]."""
        from slm_pipeline.engine.blocks import around

        chosen = self._is_held_out(problem.input_ids).flatten() == held_out
        for states in around(problem.view, problem.input_ids, removed[0], removed[-1] + 1):
            here, chosen = chosen[: states[0][..., 0].numel()], chosen[states[0][..., 0].numel() :]
            if here.any():
                output, before, after = (rows.flatten(0, 1)[here.to(rows.device)] for rows in states)
                yield output, before, after

    def _is_held_out(self, input_ids: Tensor) -> Tensor:
        """Which tokens are not fitted: those of whole samples, at even distances."""
        import torch

        chosen = torch.zeros(input_ids.shape, dtype=torch.bool)
        units = chosen if len(chosen) > 1 else chosen.T  # samples, or the tokens of a single one
        count = min(max(1, round(self.held_out * len(units))), len(units) - 1) if self.held_out else 0
        if len(chosen) > 1:
            units[(2 * torch.arange(count) + 1) * len(units) // (2 * max(1, count))] = True
        else:
            units[len(units) - count :] = True
        return chosen

    def _least_squares(self, problem: PruningProblem, removed: list[int]) -> Tensor:
        """argmin_T |m T - (h_e - h_s + m)|^2 + ridge tr(m' m) / d |T - T_0|^2, from the two matrices of sums."""
        import torch

        gram: Any = 0
        moment: Any = 0
        for output, before, after in self._rows(problem, removed):
            inputs = output.double()
            gram = gram + inputs.T @ inputs
            moment = moment + inputs.T @ (after.double() - before.double() + inputs)
        penalty = self.ridge * gram.trace() / len(gram)
        gram.diagonal().add_(penalty)
        if self.ridge_target == "identity":
            moment.diagonal().add_(penalty)
        # Not by Cholesky: with fewer tokens than channels, or a dead channel, the sums have no full rank.
        return torch.linalg.pinv(gram, hermitian=True) @ moment

    def _most_alike(self, problem: PruningProblem, removed: list[int]) -> Tensor:
        import torch

        from slm_pipeline.show.progress import ProgressBar

        kept: list[tuple[Tensor, ...]] = []
        for output, before, after in self._rows(problem, removed):
            rest = before - output
            kept.append((output, after, rest) if self.accurate else (output, after - rest))
        outputs, targets, *rests = (torch.cat(parts) for parts in zip(*kept, strict=True))
        kept.clear()
        transform = torch.eye(outputs.shape[1], device=outputs.device, requires_grad=True)
        optimizer = torch.optim.Adam([transform], lr=self.learning_rate)
        generator = torch.Generator().manual_seed(0)
        for _ in ProgressBar(range(self.num_epochs), desc="replaceme", unit="epoch"):
            for chosen in torch.randperm(len(outputs), generator=generator).split(self.batch_tokens):
                chosen = chosen.to(outputs.device)
                with torch.enable_grad():
                    mapped = outputs[chosen].float() @ transform
                    if self.accurate:
                        mapped = mapped + rests[0][chosen].float()
                    loss = -torch.cosine_similarity(mapped, targets[chosen].float(), dim=-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return transform.detach()

    def _fit(self, problem: PruningProblem, removed: list[int], transform: Tensor) -> tuple[dict[str, Any], list[str]]:
        """How well the map does on the tokens fitted and on those held out, and what is to be said of that."""
        fit = {"fitted": self._cosines(problem, removed, transform, held_out=False)}
        if self._is_held_out(problem.input_ids).any():
            fit["held_out"] = self._cosines(problem, removed, transform, held_out=True)
        num_tokens, width = fit["fitted"]["num_tokens"], len(transform)
        if num_tokens >= TOKENS_PER_CHANNEL * width:
            return fit, []
        without_ridge = self.solver == "least_squares" and self.ridge == 0
        return fit, [
            f"replaceme: {num_tokens} tokens for a linear map of {width} x {width} numbers, fewer than"
            f" {TOKENS_PER_CHANNEL} x {width}: it may fit them and nothing else ({format_fit(fit)}); take more"
            " calibration.num_samples or a longer calibration.seq_len"
            + (", or method.ridge=0.1 method.ridge_target=identity" if without_ridge else "")
        ]

    def _cosines(
        self, problem: PruningProblem, removed: list[int], transform: Tensor, *, held_out: bool
    ) -> dict[str, float]:
        import torch

        num_tokens, cosine_before, cosine_after = 0, 0.0, 0.0
        for output, before, after in self._rows(problem, removed, held_out=held_out):
            mapped = output.float() @ transform.to(output.device).float() + before.float() - output.float()
            num_tokens += len(output)
            cosine_before += float(torch.cosine_similarity(before.float(), after.float(), dim=-1).sum())
            cosine_after += float(torch.cosine_similarity(mapped, after.float(), dim=-1).sum())
        return {
            "num_tokens": num_tokens,
            "cosine_before": cosine_before / num_tokens,
            "cosine_after": cosine_after / num_tokens,
        }
