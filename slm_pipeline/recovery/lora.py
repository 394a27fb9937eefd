"""Recovery with low-rank adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_pipeline.artifacts import write_json
from slm_pipeline.errors import UserError
from slm_pipeline.recovery.base import RecoveryResult, TrainingOptions

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class Lora(TrainingOptions):
    """LoRA (arXiv 2106.09685) with peft, then merged into the weights.

    The adapters are float32 and stay in ``out/adapter`` in peft's format. Merging happens in float32 and is rounded
    to the model's own dtype once. The settings are those of ``script/lora_slm.sh`` in SLM's code.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] | None = None  # None: every linear layer of every block, seven for Llama
    use_dora: bool = False  # arXiv 2402.09353
    use_rslora: bool = False  # arXiv 2312.03732: scale alpha / sqrt(rank) instead of alpha / rank
    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"recovery.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"recovery.dropout={self.dropout} must be in [0, 1)")
        if self.target_modules == []:
            raise UserError("recovery.target_modules=[] trains nothing; name layers, or null for all")

    def run(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        base_path: str,
        seed: int,
        data_dir: Path | None,
        log: Callable[[dict[str, float], int], None],
        **_: Any,
    ) -> RecoveryResult:
        """Train and merge; see `Recovery`. ``teacher`` and ``plan`` are not used.

        Leaves ``adapter/``, ``curve.json`` and, last of all, ``metrics.json`` in ``out``.
        """
        from peft import PeftModel

        if not (out / "metrics.json").is_file():
            self._train(model, tokenizer, out, base_path, seed, data_dir, log)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        adapted = PeftModel.from_pretrained(model, str(out / "adapter"), torch_device=str(model.device))
        return RecoveryResult(
            merge_adapter(adapted),
            metrics=json.loads((out / "metrics.json").read_text(encoding="utf-8")),
            curve=json.loads((out / "curve.json").read_text(encoding="utf-8")),
        )

    def _train(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        base_path: str,
        seed: int,
        data_dir: Path | None,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        from peft import get_peft_model
        from transformers import set_seed

        from slm_pipeline.recovery import training

        self._check_targets(model)
        train, validation = self.tokenized_split(tokenizer, data_dir)
        set_seed(seed)
        adapted = get_peft_model(model, self._peft_config())
        adapted.peft_config["default"].base_model_name_or_path = ""  # else every checkpoint looks for it on the hub
        trainable, total = adapted.get_nb_trainable_parameters()
        logger.info("LoRA trains %d of %d parameters on %d examples", trainable, total, len(train))
        result = training.fit(
            adapted,
            train,
            validation,
            self,
            folder=out / "checkpoints",
            pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,  # masked: any token will do
            seed=seed,
            log=log,
        )
        adapted.load_adapter(str(result.best_checkpoint), "default", torch_device=str(model.device))
        adapted.peft_config["default"].base_model_name_or_path = base_path
        adapted.save_pretrained(str(out / "adapter"), save_embedding_layers=False)
        adapted.unload()
        write_json(out / "curve.json", result.curve)
        metrics = {
            **result.metrics,
            "trainable_parameters": trainable,
            "num_examples": len(train),
            "num_validation_examples": len(validation),
        }
        write_json(out / "metrics.json", metrics)

    def _peft_config(self) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or "all-linear",  # all but the output head
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def _check_targets(self, model: PreTrainedModel) -> None:
        from torch import nn

        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if unknown := sorted(set(self.target_modules or []) - linear):
            has = ", ".join(sorted(linear))
            raise UserError(f"recovery.target_modules: the model has no linear layer {unknown[0]!r}; it has {has}")


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
