"""`ModelView`: the only code that reaches inside a model.

It finds the decoder blocks, the final norm and the head of a causal language model, says which parameters of a block
are norms, and rebuilds the model around another list of blocks so that plain transformers can save and load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_pipeline.models import architectures


class ModelView:
    """A decoder-only causal language model, seen as a stack of blocks on a residual stream.

    Raises:
        UserError: the architecture is not supported.
    """

    def __init__(self, model: Any):
        self.model = model
        self.config = model.config
        self.architecture = architectures.find(self.config.to_dict())

    @cached_property
    def decoder(self) -> Any:
        return self.model.get_submodule(self.architecture.decoder)

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.decoder.get_submodule(self.architecture.layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def final_norm(self) -> nn.Module:
        return cast(nn.Module, self.decoder.get_submodule(self.architecture.final_norm))

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the embedding."""
        return cast(torch.device, self.decoder.get_submodule(self.architecture.embedding).weight.device)

    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def block_parameters(self, layer: int) -> int:
        return sum(parameter.numel() for parameter in self.layers[layer].parameters())

    def norm_names(self, layer: int) -> list[str]:
        """Names, within the block, of the parameters of its normalisation layers."""
        names = [name for name, _ in self.layers[layer].named_parameters()]
        return [name for name in names if name.split(".")[0] in self.architecture.norms]

    def matrix_names(self, layer: int) -> list[str]:
        """Names, within the block, of its projection matrices (biases and q/k norms are not among them)."""
        parameters = self.layers[layer].named_parameters()
        return [name for name, parameter in parameters if parameter.ndim == 2]

    def attention_output(self, layer: int) -> nn.Module:
        """The projection at the end of a block's attention; its input is the concatenated heads."""
        return self.layers[layer].get_submodule(self.architecture.attention_output)

    def mlp_output(self, layer: int) -> nn.Module:
        """The projection at the end of a block's feed-forward network; its input is the hidden neurons."""
        return self.layers[layer].get_submodule(self.architecture.mlp_output)

    def logits(self, normed: Tensor) -> Tensor:
        """Next-token logits of final-normed states: [..., d] -> [..., vocabulary], as the model's own forward does."""
        head = self.model.get_output_embeddings()
        logits = head(normed.to(head.weight.device))
        if scaling := getattr(self.config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return cast(Tensor, logits)

    def rebuild(self, blocks: Sequence[nn.Module], sources: Sequence[int]) -> None:
        """Make ``blocks`` the model's whole stack.

        Args:
            blocks: the new blocks, input side first.
            sources: for each, the present index of the block whose entry in the configuration's per-layer lists
                (``layer_types`` and the like) it keeps.
        """
        old_depth = self.num_layers
        parent, _, name = self.architecture.layers.rpartition(".")
        setattr(self.decoder.get_submodule(parent), name, nn.ModuleList(blocks))
        for position, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = position  # the slot in the KV cache
        for key, value in list(vars(self.config).items()):
            if isinstance(value, (list, tuple)) and len(value) == old_depth:
                setattr(self.config, key, type(value)(value[source] for source in sources))
        self.config.num_hidden_layers = len(blocks)
