"""Recovery by training the top of the model alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slm_pipeline.config.ranges import NumLayersOrZero
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.fine_tuning import FineTuning

if TYPE_CHECKING:
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.source import ModelSource


@dataclass(kw_only=True)
class PartialLayers(FineTuning):
    """Partial-layer fine-tuning of "Reassessing Layer Pruning in LLMs", arXiv 2411.15558: the last blocks, the final
    norm and the output head train, all below is frozen.

    The published code trains the final norm too, which the paper does not say; ``final_norm=false`` leaves it. It
    names models whose head is not the embedding; where it is (SmolLM2, Gemma), ``head=null`` leaves the head frozen,
    since training it would train the embedding and with it the input of every frozen block.

    The frozen blocks run without a graph and without a backward pass: nothing below the lowest trained block asks for
    a gradient, so none of its activations is kept.
    """

    num_layers: NumLayersOrZero = 3  # blocks, from the top
    head: bool | None = None  # None: trained unless it is the embedding
    final_norm: bool = True

    learning_rates: ClassVar[tuple[float, float]] = (2e-3, 1e-5)
    name: ClassVar[str] = "partial_layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers == 0 and not self.final_norm and self.head is False:
            raise UserError("recovery.num_layers=0, recovery.final_norm=false and recovery.head=false train nothing")

    def check(self, source: ModelSource, num_layers: int | None) -> None:
        super().check(source, num_layers)
        if num_layers is not None:
            self._require(num_layers, "the pruned model")
        elif source.num_layers is not None:
            self._require(source.num_layers, source.name)

    def memory(self, sizes: Sizes) -> int:
        """With a head that is no embedding, if it is not left out."""
        head = sizes.hidden * sizes.vocabulary if self.head is not False and not sizes.is_tied else 0
        trained = min(self.num_layers, sizes.layers) * sizes.block_parameters + head + self.final_norm * sizes.hidden
        return self.training(sizes, trained) + self.activations(sizes, layers=self.num_layers)

    def _require(self, num_layers: int, whose: str) -> None:
        if self.num_layers > num_layers:
            raise UserError(f"recovery.num_layers={self.num_layers} is more than the {num_layers} layers of {whose}")

    def preflight(self, source: ModelSource, data_dir: Path | None) -> None:
        from slm_pipeline.models.loading import ties_embeddings

        if self.num_layers == 0 and not self.final_norm and self.head is None and ties_embeddings(source):
            raise UserError(
                "recovery.num_layers=0 and recovery.final_norm=false train nothing: the output head of"
                f" {source.name} is its embedding, which stays frozen"
            )
        if self.head and ties_embeddings(source):
            raise UserError(
                f"recovery.head=true: the output head of {source.name} is its embedding, below every frozen layer;"
                " use recovery.head=null or false, or recovery=full"
            )
        super().preflight(source, data_dir)

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train; leaves nothing in ``out`` but checkpoints.

        Raises:
            UserError: also when ``num_layers`` is more than the model has.
        """
        from slm_pipeline.models.view import ModelView

        view = ModelView(problem.model)
        self._require(view.num_layers, "the pruned model")
        modules = list(view.layers[view.num_layers - self.num_layers :])
        if self.final_norm:
            modules.append(view.final_norm)
        if self.head or (self.head is None and not view.ties_embeddings):
            modules.append(view.head)
        return self.train_modules(problem, modules)
