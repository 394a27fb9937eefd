"""Layer after layer: the states that enter one layer, of all calibration text, in the model as it has become below."""

from __future__ import annotations

import torch
from torch import Tensor

from slm_pipeline.engine.blocks import BlockRunner, batches, entering_and_leaving, rows_at_once
from slm_pipeline.engine.least_squares import Gram
from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block

_PASS_TOKENS = 8192  # of the text, that are embedded at once
_DEVICE_BYTES = 8 << 30  # of states; more stay in the host's memory


class Stream:
    """The residual stream of N samples at one layer of the stack, from the lowest layer up.

    One state a token is in memory, whatever the depth, and one Gram matrix at a time.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] int64 calibration tokens.

    Attributes:
        states: [N, length, d] in the model's dtype, that enter the next layer.
    """

    @torch.no_grad()
    def __init__(self, view: ModelView, input_ids: Tensor):
        self.view = view
        # what blocks are given beside the states is alike for all
        self._runner = BlockRunner(view, input_ids[:1], whole=False)
        size = input_ids.numel() * view.config.hidden_size * view.dtype.itemsize
        home = view.device if size <= _DEVICE_BYTES else torch.device("cpu")
        inputs = ({"input_ids": batch.to(view.device)} for batch in batches(input_ids, _PASS_TOKENS))
        self.states = torch.cat([entering_and_leaving(view, batch, [0], [0], [])[0][0].to(home) for batch in inputs])

    def gram(self, block: Block, sublayer: str) -> Gram:
        """Of the inputs of the last projection of ``block``'s sublayer (attention, mlp), which the states enter.

        Raises:
            UserError: they are not finite.
        """
        found: Gram | None = None
        for piece in self.states.split(rows_at_once(self.states)):
            rows = self._runner.inputs_of(block, piece.to(self.view.device_of(block.body)), sublayer)
            found = found or Gram(rows.shape[1], rows.device)
            found.add(rows)
        assert found is not None
        if not bool(found.matrix.isfinite().all()):
            raise UserError(
                f"what enters the last projection of layer {block.body}'s {sublayer} is not finite; try"
                " model.dtype=float32"
            )
        return found

    def pass_through(self, block: Block) -> None:
        """Let the states go through ``block``."""
        for piece in self.states.split(rows_at_once(self.states)):
            piece.copy_(self._runner.run(block, piece.to(self.view.device_of(block.body))))
