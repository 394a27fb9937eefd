"""`ModelView`: the only code that reaches inside a model.

It finds the decoder blocks, the final norm and the head of a causal language model, says which parameters of a block
are norms, and rebuilds the model around another list of blocks so that plain transformers can save and load it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_pipeline.models import architectures, modeling_pruned
from slm_pipeline.models.modeling_pruned import NoAttention, NoFeedForward, stand_in


@dataclass(frozen=True)
class Slice:
    """Which part of a parameter belongs to which unit (key-value group or neuron).

    Attributes:
        parameter: name within the block.
        dim: 0 for rows, 1 for columns.
        units: one [num_units, size] tensor of indices for each part that the parameter is made of, in order (a fused
            projection has several parts); together they cover the dimension.
    """

    parameter: str
    dim: int
    units: list[Tensor]


def _units(start: int, width: int, num_units: int) -> Tensor:
    return torch.arange(start, start + width).view(num_units, -1)


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
    def head(self) -> nn.Module:
        """The projection to the vocabulary."""
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head's weight is the embedding's."""
        embedding = self.decoder.get_submodule(self.architecture.embedding)
        return cast(Any, self.head).weight is embedding.weight

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the embedding."""
        return cast(torch.device, self.decoder.get_submodule(self.architecture.embedding).weight.device)

    @property
    def stream(self) -> Any | None:
        """The `LayerStream` of a model whose blocks stay on disk, else None."""
        return getattr(self.model, "layer_stream", None)

    def device_of(self, layer: int) -> torch.device:
        """Where a block runs."""
        if self.stream is not None:
            return cast(torch.device, self.stream.device)
        return next(self.layers[layer].parameters()).device

    def bring(self, layer: int) -> nn.Module:
        """The block, where it runs; of a model whose blocks stay on disk the only one that is there then."""
        if self.stream is not None:
            self.stream.enter(self.layers[layer])
        return self.layers[layer]

    def rest(self) -> None:
        """Of a model whose blocks stay on disk let go of the one that was run last: before weights are changed."""
        if self.stream is not None:
            self.stream.leave()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the head's weight, in which logits are computed."""
        return cast(torch.dtype, self.head.weight.dtype)

    def num_parameters(self) -> int:
        """All parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def block_parameters(self, layer: int) -> int:
        return sum(parameter.numel() for parameter in self.layers[layer].parameters())

    def attention_windows(self) -> list[int | None]:
        """How many tokens back each layer attends, by the configuration; None: to all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["sliding_attention"] * self.num_layers
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def norm_names(self, layer: int) -> list[str]:
        """Names, within the block, of the parameters of its normalisation layers."""
        names = [name for name, _ in self.layers[layer].named_parameters()]
        return [name for name in names if name.split(".")[0] in self.architecture.norms]

    def matrix_names(self, layer: int) -> list[str]:
        """Names, within the block, of its projection matrices (biases and q/k norms are not among them)."""
        parameters = self.layers[layer].named_parameters()
        return [name for name, parameter in parameters if parameter.ndim == 2]

    def reading_names(self, layer: int, sublayer: str) -> list[str]:
        """Names, within the block, of the matrices with which a sublayer (attention, mlp) reads what enters it."""
        children, output = self.sublayer(sublayer), f"{self.output_name(sublayer)}.weight"
        return [name for name in self.matrix_names(layer) if name.partition(".")[0] in children and name != output]

    def sublayer(self, name: str) -> tuple[str, ...]:
        """The children of a block that make up its sublayer ``name`` (attention, mlp), its norms among them."""
        if name == "attention":
            return (self.architecture.attention, *self.architecture.attention_norms)
        return (*self.architecture.mlp, *self.architecture.mlp_norms)

    def lacks(self, layer: int, name: str) -> bool:
        """Whether a layer has no sublayer ``name`` (attention, mlp)."""
        if name == "attention":
            return isinstance(self.layers[layer].get_submodule(self.architecture.attention), NoAttention)
        return isinstance(self.layers[layer].get_submodule(self.architecture.mlp[-1]), NoFeedForward)

    def sublayer_parameters(self, layer: int, name: str) -> int:
        """Parameters of a block's sublayer (attention, mlp)."""
        children = [self.layers[layer].get_submodule(child) for child in self.sublayer(name)]
        return sum(parameter.numel() for child in children for parameter in child.parameters())

    @contextmanager
    def lacking(self, layer: int, sublayers: Collection[str], block: nn.Module | None = None) -> Iterator[None]:
        """The block, or ``block`` in its place, without some sublayers (attention, mlp), for a while: they are not run
        and add nothing."""
        block = self.layers[layer] if block is None else block
        children = [child for sublayer in sublayers for child in self.sublayer(sublayer)]
        present = {child: block.get_submodule(child) for child in children}
        try:
            for child in present:
                block.set_submodule(child, stand_in(child, layer))
            yield
        finally:
            for child, module in present.items():
                block.set_submodule(child, module)

    def silence(self, layer: int, sublayer: str) -> None:
        """Set a sublayer's last projection to zero, so that it adds nothing; the model's class and size stay."""
        with torch.no_grad():
            for parameter in self.output(layer, sublayer).parameters():
                parameter.data = torch.zeros_like(parameter)

    def become_pruned(self) -> None:
        """Give the model its architecture's class of `modeling_pruned`."""
        if self.config.model_type.startswith(architectures.PRUNED):
            return
        pruned = getattr(modeling_pruned, f"Pruned{type(self.model).__name__}")
        self.config.__class__ = pruned.config_class  # the modules share this object, so it is changed where it is
        self.config.model_type = pruned.config_class.model_type  # one that was read from a file has its own
        self.model.__class__ = pruned
        # What transformers renamed when it read the former class it would name back in a file of this one, which it
        # then reads as it is: GPT-NeoX's head.
        self.model._weight_conversions = None

    def allows_kv_heads(self, groups: int) -> bool:
        """Whether the model's own class can have so many key-value groups in every layer, each with as many query heads
        of the same width as now."""
        if groups == self.num_kv_heads:
            return True
        heads = groups * self.heads_per_group
        divides = not self.architecture.heads_divide_hidden or self.config.hidden_size % heads == 0
        return self.architecture.head_dim_is_free and divides

    def output_name(self, sublayer: str) -> str:
        """Name, within a block, of the last projection of a sublayer (attention, mlp)."""
        return self.architecture.attention_output if sublayer == "attention" else self.architecture.mlp_output

    def output_norm(self, layer: int, sublayer: str) -> tuple[str, Tensor] | None:
        """Of the norm between a sublayer's last projection and the residual stream its name within the block, and the
        gains [d] float32 by which it multiplies, where the block runs; None if there is none."""
        if not self.architecture.output_norms:
            return None
        name = (self.architecture.attention_norms if sublayer == "attention" else self.architecture.mlp_norms)[-1]
        gains = self.layers[layer].get_parameter(f"{name}.weight").detach().to(self.device_of(layer))
        return name, gains.float() + self.architecture.gain_offset

    def attention_output(self, layer: int) -> nn.Module:
        """The projection at the end of a block's attention; its input is the concatenated heads."""
        return self.layers[layer].get_submodule(self.architecture.attention_output)

    def mlp_output(self, layer: int) -> nn.Module:
        """The projection at the end of a block's feed-forward network; its input is the hidden neurons."""
        return self.layers[layer].get_submodule(self.architecture.mlp_output)

    def output(self, layer: int, sublayer: str) -> nn.Linear:
        """The projection with which a sublayer (attention, mlp) writes to the residual stream."""
        return cast(nn.Linear, self.layers[layer].get_submodule(self.output_name(sublayer)))

    def num_units(self, layer: int, sublayer: str) -> int:
        """Key-value groups of a layer's attention, or neurons of its mlp. The inputs of `output` lie unit by unit."""
        return self.kv_heads_of(layer) if sublayer == "attention" else self.neurons_of(layer)

    @property
    def num_kv_heads(self) -> int:
        """Key-value groups of an attention layer, by the configuration: the units in which attention can be cut."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share keys and values."""
        return int(self.config.num_attention_heads) // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def num_neurons(self) -> int:
        """Hidden neurons of a feed-forward network whose layers are alike."""
        return self.neurons_of(0)

    def kv_heads_of(self, layer: int) -> int:
        """Key-value groups of a layer, which may have lost some, or all with its attention."""
        if self.lacks(layer, "attention"):
            return 0
        return cast(nn.Linear, self.attention_output(layer)).in_features // (self.head_dim * self.heads_per_group)

    def neurons_of(self, layer: int) -> int:
        """Hidden neurons of a layer, which may have lost some, or all with its feed-forward network."""
        if self.lacks(layer, "mlp"):
            return 0
        return cast(nn.Linear, self.mlp_output(layer)).in_features

    def attention_slices(self, layer: int, *, tiled_queries: bool = False) -> list[Slice]:
        """Which rows and columns belong to each key-value group: its keys and values, and its queries and outputs.

        Gains of query and key norms that are as wide as all heads (OLMo 2) are among them; those of one head's width
        (Qwen3, Gemma 3) serve all heads and belong to none.

        transformers keeps the query heads of a group side by side: head h uses group h // (heads per group).
        ``tiled_queries`` gives group g the heads g, g + groups, ... instead: wrong, but what CoMe's code does.
        """
        groups = self.kv_heads_of(layer)
        if not groups:
            return []
        queries = cast(nn.Linear, self.attention_output(layer)).in_features
        keys = queries // self.heads_per_group
        inputs = self.architecture.attention_inputs
        if len(inputs) == 3:
            widths = {inputs[0]: [queries], inputs[1]: [keys], inputs[2]: [keys]}
        elif self.architecture.heads_interleaved:
            widths = {inputs[0]: [3 * queries]}
        else:
            widths = {inputs[0]: [queries, keys, keys]}
        for name, width in zip(self.architecture.query_key_norms, (queries, keys), strict=False):
            widths[name] = [width]
        slices = self._slices(layer, widths, self.architecture.attention_output, queries, groups)
        if tiled_queries and len(inputs) == 3:
            tiled = [torch.arange(queries).view(-1, groups, keys // groups).transpose(0, 1).reshape(groups, -1)]
            of_queries = (inputs[0], self.architecture.attention_output, *self.architecture.query_key_norms[:1])
            slices = [
                replace(piece, units=tiled) if piece.parameter.startswith(of_queries) else piece for piece in slices
            ]
        return slices

    def mlp_slices(self, layer: int) -> list[Slice]:
        """Which rows and columns belong to each hidden neuron."""
        neurons = self.neurons_of(layer)
        if not neurons:
            return []
        block = self.layers[layer]
        inputs = {name: cast(nn.Linear, block.get_submodule(name)) for name in self.architecture.mlp_inputs}
        widths = {name: [neurons] * (linear.out_features // neurons) for name, linear in inputs.items()}
        return self._slices(layer, widths, self.architecture.mlp_output, neurons, neurons)

    def _slices(
        self, layer: int, widths: dict[str, list[int]], output: str, out_width: int, num_units: int
    ) -> list[Slice]:
        slices = []
        block = self.layers[layer]
        for name, parts in widths.items():
            for parameter in ("weight", "bias"):
                if getattr(block.get_submodule(name), parameter, None) is not None:
                    starts = [sum(parts[:index]) for index in range(len(parts))]
                    units = [_units(start, width, num_units) for start, width in zip(starts, parts, strict=True)]
                    slices.append(Slice(f"{name}.{parameter}", 0, units))
        slices.append(Slice(f"{output}.weight", 1, [_units(0, out_width, num_units)]))
        return slices

    def head_parameters(self) -> int:
        """Parameters of the projection to the vocabulary, tied or not."""
        return int(cast(Any, self.head).weight.numel())

    def logits(self, normed: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Next-token logits of final-normed states: [..., d] -> [..., vocabulary], as the model's own forward does.

        ``tokens``: indices of a part of the vocabulary; then only their logits, in that order.
        """
        head: Any = self.head
        if tokens is None:
            logits = head(normed.to(head.weight.device))
        else:
            rows = tokens.to(head.weight.device)
            bias = None if head.bias is None else head.bias[rows]
            logits = nn.functional.linear(normed.to(head.weight.device), head.weight[rows], bias)
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
                (`architectures.PER_LAYER_LISTS`) it keeps.
        """
        old_depth = self.num_layers
        parent, _, name = self.architecture.layers.rpartition(".")
        setattr(self.decoder.get_submodule(parent), name, nn.ModuleList(blocks))
        for position, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    cast(Any, module).layer_idx = position  # the slot in the KV cache
        settings = vars(self.config)
        for key in settings.keys() & set(architectures.PER_LAYER_LISTS):
            if settings[key] is not None:
                setattr(self.config, key, [settings[key][source] for source in sources])
        for key in settings.keys() & set(architectures.LAYER_COUNTS):
            if settings[key] is not None:
                setattr(self.config, key, sum(source < settings[key] for source in sources))
        if list(sources) != list(range(old_depth)):  # no period describes what is left
            for key in settings.keys() & set(architectures.LAYER_PERIODS):
                delattr(self.config, key)
        self.config.num_hidden_layers = len(blocks)
        if self.stream is not None:
            self.stream.blocks = [*blocks]
