"""A frozen model in 4 or 8 bits beside which adapters train (QLoRA, arXiv 2305.14314), with bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PIECE = 64  # weights that share a scale in 4 bits; bitsandbytes 0.50's kernel takes rows of 96 for whole pieces
_MARKS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}  # attributes by which peft knows such a model


def quantize(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> dict[str, nn.Linear]:
    """Put quantised layers in the places of the linear layers of all blocks, one block after the other.

    The blocks come to where the embedding lies; beside those that are quantised one is there whole. Embedding, norms
    and head stay as they are.

    Args:
        kind: ``nf4``, normal floats of 4 bits in pieces of 64, whose scales are quantised too; ``int8``, LLM.int8(),
            a scale for each row, with inputs beyond 6 in 16 bits.
        dtype: in which products are computed.

    Returns:
        The layers that were there, by their full names, in main memory or in the files where they lay.

    Raises:
        UserError: 4 bits on a processor, and a layer's inputs are no multiple of 64.
    """
    view, plain = ModelView(model), {}
    names = {module: name for name, module in model.named_modules()}
    for block in view.layers:
        layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name, layer in layers.items():
            if kind == "nf4" and view.device.type == "cpu" and layer.in_features % _PIECE:
                raise UserError(
                    f"recovery.quantize=nf4: {names[layer]} has {layer.in_features} inputs, no multiple of {_PIECE},"
                    " and bitsandbytes reads other weights from it than it wrote on a processor; use int8, or a GPU"
                )
            block.set_submodule(name, _quantized(layer, kind, dtype).to(view.device))
            plain[names[layer]] = layer.to("cpu")
        block.to(view.device)
    setattr(model, _MARKS[kind], True)
    return plain


def on_plain_weights(adapted: PeftModel, plain: dict[str, nn.Linear]) -> PeftModel:
    """The same adapters on the layers of `quantize`, in main memory; ``adapted`` is used up."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, state = adapted.peft_config["default"], get_peft_model_state_dict(adapted)
    model: Any = adapted.unload()
    for name, layer in plain.items():
        model.set_submodule(name, layer)
    for mark in _MARKS.values():
        vars(model).pop(mark, None)
    whole: Any = get_peft_model(model.to("cpu"), config)
    set_peft_model_state_dict(whole, state)
    return whole


def _quantized(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer that quantises its weight when it is moved to where it runs."""
    import bitsandbytes

    shape: dict[str, Any] = {
        "input_features": layer.in_features,
        "output_features": layer.out_features,
        "bias": layer.bias is not None,
        "device": "meta",
    }
    new: Any
    weight: Tensor = layer.weight.detach()
    if kind == "nf4":
        new = bitsandbytes.nn.Linear4bit(**shape, quant_type="nf4", compute_dtype=dtype)
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
        new.support_avx512bf16_for_cpu = False  # validation would pack it for a product that no gradient goes through
    else:
        new = bitsandbytes.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
        new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:  # its own: it is cast to the inputs' type
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return new
