"""ReplaceMe: remove the contiguous block whose ends are closest, and put a linear map in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.errors import UserError
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.ranges import Count, NotNegative, Positive
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.models.source import ModelSource

SOLVERS = ("least_squares", "cosine")


@dataclass(kw_only=True)
class ReplaceMe(AngularDistance):
    """ReplaceMe, arXiv 2505.02819. The block is that of ``angular``; nothing is added to the model.

    Let layers s .. e - 1 go, m be the output of the feed-forward network of layer s - 1 and h_s, h_e the residual
    stream that enters layers s and e, as rows, one for each calibration token. The map T with
    m T + (h_s - m) ~ h_e is folded into the last projection of that network, so the checkpoint is a stock one.

    Departures from the published code: no padding tokens in the fit, because calibration text has none; the forward
    pass ends at layer e; least squares keeps two d x d matrices instead of all activations, and has a ridge in units
    of the data's own scale; refused for architectures that put a norm after the projection, where folding is wrong.
    One block only; the published code can cut several. The published text is 8000 chat samples of SlimOrca.

    Options:
        solver: least_squares (closed form, float64) or cosine (the mean of cos(m T, h_e - h_s + m) is maximised with
            Adam from T = 1; keeps two [tokens, d] matrices in the model's dtype on its device, twice that while they
            are put together).
        ridge: least squares: the penalty on T's size, relative to the mean square of m; 0 as published.
        accurate: cosine: maximise cos(m T + h_s - m, h_e) instead; keeps a third matrix.
        learning_rate, num_epochs, batch_tokens: cosine: of Adam. The published values.

    Scores in the plan: distances as for ``angular``; cosine_before and cosine_after, the mean over tokens of
    cos(h_s, h_e) and of cos(m T + h_s - m, h_e).
    """

    solver: str = "least_squares"
    ridge: NotNegative = 0.0
    accurate: bool = False
    learning_rate: Positive = 1e-4
    num_epochs: Count = 10
    batch_tokens: Count = 1024

    name: ClassVar[str] = "replaceme"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect_first < 1:
            raise UserError(f"method.protect_first={self.protect_first} must be at least 1: a layer must be left below")
        if self.solver not in SOLVERS:
            raise UserError(f"method.solver={self.solver!r} is not one of {', '.join(SOLVERS)}")

    def check(self, source: ModelSource) -> None:
        if source.architecture.output_norms:
            raise UserError(
                f"method=replaceme: in {source.name} a norm follows the last projection of the feed-forward network, so"
                " a linear map cannot be folded into it"
            )

    def plan(self, problem: PruningProblem) -> Plan:
        import torch

        assert problem.num_remove is not None
        removed, distances = self.closest_ends(problem.statistics.angle_last, problem.num_remove)
        if self.solver == "least_squares":
            transform = self._least_squares(problem, removed)
        else:
            transform = self._most_alike(problem, removed)
        if not bool(torch.isfinite(transform).all()):
            raise UserError(
                "method=replaceme: the linear map is not finite; try model.dtype=float32 or method.ridge=1e-4"
            )
        fold = {"op": "fold", "layers": [removed[0] - 1], "tensor": "fold.0"}
        return self._new_plan(
            problem,
            layer_groups=[[layer] for layer in range(problem.view.num_layers) if layer not in removed],
            dropped=removed,
            ops=[{"op": "drop", "layers": removed}, fold],
            tensors={"fold.0": transform.float().cpu().numpy()},
            scores={"order": removed, "distances": distances, **self._cosines(problem, removed, transform)},
        )

    def _rows(self, problem: PruningProblem, removed: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """m, h_s and h_e of one batch of samples after the other, [tokens, d] each."""
        from slm_pipeline.engine.blocks import around

        for output, before, after in around(problem.view, problem.input_ids, removed[0], removed[-1] + 1):
            yield output.flatten(0, 1), before.flatten(0, 1), after.flatten(0, 1)

    def _least_squares(self, problem: PruningProblem, removed: list[int]) -> Tensor:
        """argmin_T |m T - (h_e - h_s + m)|^2 + ridge tr(m' m) / d |T|^2, from the two matrices of sums."""
        import torch

        gram: Any = 0
        moment: Any = 0
        for output, before, after in self._rows(problem, removed):
            inputs = output.double()
            gram = gram + inputs.T @ inputs
            moment = moment + inputs.T @ (after.double() - before.double() + inputs)
        gram.diagonal().add_(self.ridge * gram.trace() / len(gram))
        # Not by Cholesky: with fewer tokens than channels, or a dead channel, the sums have no full rank.
        return torch.linalg.pinv(gram, hermitian=True) @ moment

    def _most_alike(self, problem: PruningProblem, removed: list[int]) -> Tensor:
        import torch
        from tqdm import tqdm

        kept: list[tuple[Tensor, ...]] = []
        for output, before, after in self._rows(problem, removed):
            rest = before - output
            kept.append((output.clone(), after.clone(), rest) if self.accurate else (output.clone(), after - rest))
        outputs, targets, *rests = (torch.cat(parts) for parts in zip(*kept, strict=True))
        kept.clear()
        transform = torch.eye(outputs.shape[1], device=outputs.device, requires_grad=True)
        optimizer = torch.optim.Adam([transform], lr=self.learning_rate)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(self.num_epochs), desc="replaceme", unit="epoch", disable=None):
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

    def _cosines(self, problem: PruningProblem, removed: list[int], transform: Tensor) -> dict[str, float]:
        import torch

        sums = {"cosine_before": 0.0, "cosine_after": 0.0}
        for output, before, after in self._rows(problem, removed):
            mapped = output.float() @ transform.to(output.device).float() + before.float() - output.float()
            sums["cosine_before"] += float(torch.cosine_similarity(before.float(), after.float(), dim=-1).sum())
            sums["cosine_after"] += float(torch.cosine_similarity(mapped, after.float(), dim=-1).sum())
        return {name: total / problem.input_ids.numel() for name, total in sums.items()}
