"""Recovery with low-rank adapters."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Range, Share
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryProblem, RecoveryResult
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.freezing import silent_modules

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.models.source import ModelSource

QUANTIZED = {"nf4": 0.516, "int8": 1.01}  # bytes of a weight with its scales


@dataclass(kw_only=True)
class Lora(FineTuning):
    """LoRA (arXiv 2106.09685) with peft, then merged into the weights.

    The adapters are float32 and stay in ``out/adapter`` in peft's format. Merging happens in float32 and is rounded
    to the model's own dtype once. With ``quantize`` they train beside a model in 4 or 8 bits, and are then merged into
    the weights that it was made of, which lie in main memory meanwhile, or in their files. Rank, alpha and dropout are
    those of ``script/lora_slm.sh`` in SLM's code.
    """

    rank: Annotated[int, Range(at_least=1, at_most=2**16)] = 8
    alpha: Annotated[int, Range(at_least=1, at_most=2**16)] = 16
    dropout: Share = 0.05  # of what enters an adapter, while it trains
    target_modules: list[str] | None = None  # None: every linear layer of every block, seven for Llama
    use_dora: bool = False  # arXiv 2402.09353
    use_rslora: bool = False  # arXiv 2312.03732: scale alpha / sqrt(rank) instead of alpha / rank
    quantize: str | None = None  # nf4 | int8: the blocks' weights beside the adapters, while they train

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules == []:
            raise UserError("recovery.target_modules=[] trains nothing; name layers, or null for all")
        if self.quantize not in (None, *QUANTIZED):
            raise UserError(f"recovery.quantize={self.quantize!r} is not one of null, {', '.join(QUANTIZED)}")
        if self.quantize is not None and self.sharding:
            raise UserError(
                f"recovery.sharding=true spreads weights of 16 or 32 bits, not recovery.quantize={self.quantize}; use"
                " one of the two"
            )
        if self.quantize is not None and self.use_dora:
            raise UserError(
                f"recovery.use_dora=true learns how long the rows of weights are, and recovery.quantize={self.quantize}"
                " changes that; use one of the two"
            )

    @property
    def places_blocks(self) -> bool:
        return super().places_blocks or self.quantize is not None

    def check(self, source: ModelSource, num_layers: int | None) -> None:
        super().check(source, num_layers)
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"recovery.quantize={self.quantize} needs bitsandbytes: pip install 'slm-pipeline[quantize]', or use"
                " recovery.quantize=null"
            )
        known = {path.rpartition(".")[2] for path in source.architecture.projections}
        if unknown := sorted(set(self.target_modules or []) - known):
            raise UserError(
                f"recovery.target_modules: the blocks of a {source.model_type} model have no linear layer"
                f" {unknown[0]!r}; they have {', '.join(sorted(known))}"
            )

    def memory(self, sizes: Sizes) -> int:
        """The weights, quantised or not; adapters on every linear layer, the most there can be; what is kept of each
        token for the way back, with DoRA what leaves each layer once more; and its logits."""
        attention = 4 * sizes.hidden + 2 * (sizes.queries + sizes.keys)
        adapters = self.rank * sizes.layers * (attention + (sizes.inputs + 1) * (sizes.hidden + sizes.neurons))
        frozen, kept = sizes.weights, self.activations(sizes, adapters=True)
        if self.quantize is not None:
            matrices = sizes.layers * sizes.block_matrices
            frozen += int((QUANTIZED[self.quantize] - sizes.item_bytes) * matrices)
            kept += sizes.item_bytes * sizes.hidden * sizes.neurons  # the matrix that is multiplied with
        elif self.dtype == "bfloat16" and sizes.item_bytes == 4 and not self.sharding:
            kept += 2 * sizes.parameters  # in 16 bits, until the way back
        if self.use_dora:
            leaving = 2 * sizes.hidden + sizes.queries + 2 * sizes.keys + sizes.inputs * sizes.neurons
            kept += 4 * self.micro_batch_size * self.cutoff_len * leaving * sizes.layers
        return self.training(sizes, adapters, frozen=frozen) + kept

    def host_memory(self, sizes: Sizes) -> int:
        """The blocks' weights that quantised ones were made of."""
        return 0 if self.quantize is None else sizes.item_bytes * sizes.layers * sizes.block_matrices

    def run(self, problem: RecoveryProblem) -> RecoveryResult:
        """Train and merge; leaves ``adapter/`` in ``out``."""
        import torch
        from peft import get_peft_model
        from transformers import set_seed

        from slm_pipeline.recovery import collective, quantized
        from slm_pipeline.recovery.training_loop import fit

        train, validation = self.tokenized_split(problem.tokenizer, problem.data_dir)
        set_seed(problem.seed)
        left_out, plain = list(silent_modules(problem)), {}
        if self.quantize is not None:
            plain = quantized.quantize(problem.model, self.quantize, getattr(torch, self.dtype))
        adapted: Any = get_peft_model(problem.model, self._peft_config(left_out))
        trained = fit(adapted, train, validation, self, problem)
        if collective.count() > 1:  # else each would merge, with `quantize` a whole model each in main memory
            raise collective.Trained
        adapted.peft_config["default"].base_model_name_or_path = problem.base_path
        adapted.save_pretrained(str(problem.out / "adapter"), save_embedding_layers=False)
        if plain:
            adapted = quantized.on_plain_weights(adapted, plain)
        return RecoveryResult(merge_adapter(adapted), trained.metrics, trained.curve)

    def _peft_config(self, left_out: list[str]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or "all-linear",  # all but the output head
            exclude_modules=left_out or None,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The model inside with the adapters added to its weights, in float32, rounded to their own dtype once.

    Its logits differ from those with the adapters on by rounding alone: below 1e-4 in float32.
    """
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            dtype = base.weight.dtype
            base.float()
            layer.merge(safe_merge=True)
            base.to(dtype)
    merged: PreTrainedModel = adapted.unload()
    merged.requires_grad_(True)
    merged.eval()
    return merged
