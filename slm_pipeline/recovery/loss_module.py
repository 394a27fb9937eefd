"""A loss of our own in the form that the transformers Trainer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class LossModule(nn.Module):
    """A module whose output has ``loss``, around the model that trains on it.

    Its forward takes a batch of `Collator` and ``num_items_in_batch``, the number of labelled tokens in the whole
    optimizer step, to which the losses of its batches add up as a mean. The token that a state predicts decides
    whether the state counts: ``labels[:, t + 1]`` is about the state at t, as in a language model's own loss.

    Args:
        student: the model of which something trains.
    """

    accepts_loss_kwargs = True

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student
        if device_map := getattr(student, "hf_device_map", None):
            self.hf_device_map = device_map  # tells the Trainer to leave a model alone that lies on several devices

    def clipping_groups(self) -> list[list[nn.Parameter]]:
        """The trained parameters in groups whose losses do not depend on one another: each is clipped by itself."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def config(self) -> Any:
        return self.student.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()
