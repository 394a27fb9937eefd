"""The losses of a pruned model against its dense one, the teacher: of single layers' states, and of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cosine_similarity, kl_div, log_softmax
from transformers import PreTrainedModel

from slm_pipeline.data.tokens import IGNORED
from slm_pipeline.engine.blocks import entering_and_leaving
from slm_pipeline.models.view import ModelView
from slm_pipeline.recovery.loss_module import LossModule
from slm_pipeline.recovery.spans import Span


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Over the features of each token: [tokens, d] twice -> [tokens]."""
    return (student - teacher).square().mean(dim=-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each token's states: [tokens, d] twice -> [tokens] in [0, 2]."""
    return 1 - cosine_similarity(student, teacher, dim=-1)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """From teacher to student, of the softmax of each token's values: [tokens, n] twice -> [tokens], in nats."""
    log_student, log_teacher = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
    return kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
    "kl": kl_divergence,
    "mse_cosine": lambda student, teacher: mean_squared_error(student, teacher) + cosine_distance(student, teacher),
}


class StateLoss(LossModule):
    """Each span's layer is given what enters the span in the teacher, and is compared with what leaves it there.

    So the layers' losses do not depend on one another, and one forward pass of the teacher, as far as the last span,
    serves all of them. The teacher's states live as long as the batch.

    Args:
        teacher: the dense model.
        student: the pruned one; the spans' layers should be all that trains in it.
        bodies: for each of the student's layers the original layer whose arguments (mask, rotary embedding) it takes.
        loss: a name in `LOSSES`; computed in float32.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        spans: Sequence[Span],
        bodies: Sequence[int],
        loss: str,
    ):
        super().__init__(student)
        self.teacher = ModelView(teacher)  # no module of ours: it is neither trained nor cast
        self.layers = ModelView(student).layers
        self.spans = spans
        self.bodies = [bodies[span.position] for span in spans]
        self.loss = LOSSES[loss]

    def clipping_groups(self) -> list[list[Parameter]]:
        layers = [self.layers[span.position] for span in self.spans]
        return [[parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in layers]

    def forward(self, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> dict[str, Tensor]:
        """``loss`` of a batch of `Collator`: over the spans the sum of the mean over the counted tokens, a scalar."""
        firsts, lasts = [span.first for span in self.spans], [span.last for span in self.spans]
        entering, leaving, arguments = entering_and_leaving(self.teacher, inputs, firsts, lasts, self.bodies)
        counted = labels[:, 1:] != IGNORED
        losses = []
        for span, body in zip(self.spans, self.bodies, strict=True):
            layer = self.layers[span.position]
            args, kwargs = arguments[body]
            device = next(layer.parameters()).device
            hidden = entering[span.first].to(device)
            if not torch.is_autocast_enabled(device.type):
                hidden, args, kwargs = _to((hidden, args, kwargs), next(layer.parameters()).dtype)
            output = layer(hidden, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            here = counted.to(device)
            target = leaving[span.last].to(device)[:, :-1][here]
            losses.append(self.loss(output[:, :-1][here].float(), target.float()).sum().to(labels.device))
        return {"loss": torch.stack(losses).sum() / _num_items(counted, num_items_in_batch)}


class LogitLoss(LossModule):
    """The KL divergence from the teacher's next-token distribution to the student's, temperature 1.

    Args:
        teacher: the dense model.
        student: the pruned one.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        super().__init__(student)
        self.teacher = ModelView(teacher)

    def forward(self, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> dict[str, Tensor]:
        """``loss`` of a batch of `Collator`: the mean over the counted tokens, a scalar in nats."""
        counted = labels[:, 1:] != IGNORED
        with torch.no_grad():
            target = _logits(self.teacher, inputs, counted)
        output = _logits(ModelView(self.student), inputs, counted)
        losses = kl_divergence(output.float(), target.to(output.device).float())
        return {"loss": losses.sum().to(labels.device) / _num_items(counted, num_items_in_batch)}


def _logits(view: ModelView, inputs: dict[str, Any], counted: Tensor) -> Tensor:
    """[counted tokens, vocabulary]; the others never meet the head."""
    states = view.decoder(**{**inputs, "use_cache": False}).last_hidden_state
    return view.logits(states[:, :-1][counted.to(states.device)])


def _num_items(counted: Tensor, num_items_in_batch: Any) -> Any:
    return counted.sum() if num_items_in_batch is None else num_items_in_batch


def _to(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, dtype) for name, item in value.items()}
    return value
