"""Model cards: what a checkpoint is, what it scores, and how to load it. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.config import TARGETS
from slm_pipeline.export import llama_cpp
from slm_pipeline.models.architectures import PRUNED
from slm_pipeline.models.bundled import BUNDLED_MODELS
from slm_pipeline.results.number import Number
from slm_pipeline.results.of_run import numbers_of
from slm_pipeline.show.tables import code, code_block, markdown_escaped
from slm_pipeline.surgery.changes import Changes
from slm_pipeline.surgery.plan import Plan, format_fit, format_groups

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

REPLAY = "The whole decision, replayable with `slm method=from_plan`, is in `plan/plan.json`."


@dataclass(frozen=True)
class Base:
    """The dense model.

    Attributes:
        name: for people.
        repo: on the hub; None if it is not known to be there.
        licence: the hub's identifier; None if unknown.
    """

    name: str
    repo: str | None = None
    licence: str | None = None

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Base:
        """By the options ``model.*``; what is only on the hub is not fetched."""
        name, repo = str(model.get("name")), model.get("repo")
        if model.get("source") == "bundled" and name in BUNDLED_MODELS:
            bundled = BUNDLED_MODELS[name]
            return cls(name, bundled.repo, bundled.licence)
        if model.get("source") == "hub" and repo:
            return cls(name, repo, _licence_in(_cached(repo, model.get("revision"))))
        if model.get("source") == "local" and model.get("path"):
            return cls(name, None, _licence_in(Path(os.path.expanduser(model["path"])) / "README.md"))
        return cls(name)


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "README.md", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _licence_in(card: Path | None) -> str | None:
    """What a card's metadata says; None if there is no card, or none that says it."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(card).data.get("license") if card is not None and card.is_file() else None
    except Exception:  # anybody may have written it
        return None
    return found if isinstance(found, str) else None


def text(
    *,
    title: str,
    base: Base,
    paragraphs: Sequence[str],
    command: str,
    numbers: Sequence[Number] = (),
    which: str = "",
    description: Mapping[str, Any] | None = None,
    place: str = "FOLDER",
) -> str:
    """A model card in Markdown, with the metadata that the hub reads.

    Args:
        paragraphs: what was done, in Markdown.
        numbers: of the whole run; those of the models are tabled, those of ``which`` are in the metadata too.
        which: the model that the card is of: pruned, repaired, recovered.
        description: its config.json; None to leave out how it is loaded.
        place: what loads it: a repository, or a folder.
    """
    from huggingface_hub import ModelCardData

    of_models = [number for number in numbers if number.target and math.isfinite(number.value)]
    data = ModelCardData(
        base_model=base.repo,
        license=base.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruning", "slm-pipeline"],
        model_name=title,
        eval_results=[_result(number) for number in of_models if number.target == which] or None,
    )
    link = f"[{markdown_escaped(base.repo)}](https://huggingface.co/{base.repo})" if base.repo else code(base.name)
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {markdown_escaped(title)}",
        f"Made from {link} by slm_pipeline. The base model's licence applies"
        + (f": `{base.licence}`." if base.licence else "."),
        *paragraphs,
    ]
    if of_models:
        parts += ["## Scores", _table(of_models), _how_measured(of_models)]
    if description is not None:
        parts += ["## Use", _use(description, place)]
    parts += ["## How it was made", code_block(command, "bash")]
    return "\n\n".join(part.strip() for part in parts if part)


def in_words(plan: Plan, lines: Sequence[str]) -> str:
    """A plan as a paragraph or two.

    Args:
        lines: of `slm_pipeline.surgery.changes.Changes`.
    """
    return (
        f"Method: `{plan.method}`, {plan.model['num_layers']} -> {plan.num_layers} layers"
        + (f", similarity threshold {plan.threshold}" if plan.threshold is not None else "")
        + f".\n\nLayers, by the original layers merged into each: `{format_groups(plan.layer_groups)}`"
        + (f"; dropped: {plan.dropped}" if plan.dropped else "")
        + "".join(f"; {line}" for line in lines)
        + _measured(plan)
        + "."
    )


def recovered_in_words(plan: Plan, lines: Sequence[str], recovery: str, metrics: Mapping[str, float]) -> str:
    """What was done to a recovered model, in a sentence. ``lines`` as of `in_words`."""
    return (
        f"Pruned with `{plan.method}` (see `plan/plan.json`), then trained with `{recovery}`: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in metrics.items())
        + "".join(f"; {line}" for line in lines)
        + "."
    )


def of_run(
    summary: Mapping[str, Any],
    base: Base,
    plan: Plan,
    which: str,
    description: Mapping[str, Any],
    place: str = "FOLDER",
) -> str:
    """The full card of a run's model.

    Args:
        summary: what summary.json holds.
        which: pruned, repaired or recovered.
        description, place: see `text`.
    """
    repair = summary.get("repair", {}) if which in ("repaired", "recovered") else {}
    paragraphs = [in_words(plan, Changes.of(repair or summary).lines)]
    recovery = summary.get("recovery", {}) if which == "recovered" else {}
    if recovery:
        metrics = {name: value for name, value in recovery.items() if isinstance(value, (int, float))}
        paragraphs.append(recovered_in_words(plan, [], str(recovery["name"]), metrics))
    ends = ", ".join(filter(None, [plan.method, *(str(of.get("name", "")) for of in (repair, recovery))]))
    return text(
        title=f"{summary['model']}, {plan.num_layers} layers ({ends})",
        base=base,
        paragraphs=[*paragraphs, REPLAY],
        command=str(summary["command"]),
        numbers=list(numbers_of(summary).values()),
        which=which,
        description=description,
        place=place,
    )


def _measured(plan: Plan) -> str:
    """What the method measured of the pruned model, as a sentence; empty if nothing."""
    accepted = [step for step in plan.scores.get("steps", []) if step["accepted"]]
    num_tokens = (plan.calibration or {}).get("num_tokens")
    if accepted:
        return (
            f".\n\nSimilarity to the dense model on {num_tokens} calibration tokens: {accepted[-1]['similarity']:.4f}"
        )
    if fit := plan.scores.get("fit"):
        return f".\n\nThe linear map in the place of the layers that went: {format_fit(fit)}"
    rounds = plan.scores.get("rounds")
    if rounds and "loss" in rounds[-1]:
        return f".\n\nLoss on {num_tokens} calibration tokens: {rounds[-1]['loss']:.4f} nats a token"
    return ""


def _result(number: Number) -> EvalResult:
    """A number as the hub's metadata has it."""
    from huggingface_hub import EvalResult

    part = str(number.measured.get("part") or number.quantity)
    metric = "accuracy" if number.is_score else number.unit or number.quantity.rpartition("/")[2]
    metric = str(number.measured.get("metric") or metric)
    return EvalResult(
        task_type="text-generation",
        dataset_type=part,
        dataset_name=part,
        metric_type=metric,
        metric_name=number.quantity,
        metric_value=number.value,
        metric_args=None if number.stderr is None else {"stderr": number.stderr},
    )


def _table(numbers: Sequence[Number]) -> str:
    """Rows of quantities, columns of models."""
    models = [target for target in TARGETS if any(number.target == target for number in numbers)]
    cells = {(number.quantity, number.target): str(number) for number in numbers}
    units = {
        number.quantity: ", ".join(filter(None, [number.unit, number.direction and f"{number.direction} is better"]))
        for number in numbers
    }
    rows = [["", *models], ["---", *("---:" for _ in models)]]
    for quantity, unit in units.items():
        name = f"{quantity} ({unit})" if unit else quantity
        rows.append(
            [markdown_escaped(name).replace("|", "\\|"), *(cells.get((quantity, model), "") for model in models)]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _how_measured(numbers: Sequence[Number]) -> str:
    """One line for each way of measuring."""
    found: dict[str, list[str]] = {}
    for number in numbers:
        if how := number.measured.get("how"):
            names = found.setdefault(str(how), [])
            if number.quantity not in names:
                names.append(number.quantity)
    return "\n".join(f"- {markdown_escaped(', '.join(names))}: {markdown_escaped(how)}" for how, names in found.items())


def _use(description: Mapping[str, Any], place: str) -> str:
    model_type = str(description["model_type"])
    differs = model_type.startswith(PRUNED)
    trust = ", trust_remote_code=True" if differs else ""
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{place}"{trust})'
    )
    lines = [f"transformers, 4.57 or 5:\n\n{code_block(python, 'python')}"]
    if differs:
        lines.append(
            "Its layers differ in what they have: `modeling_pruned.py` is part of it. Tools that know stock classes"
            " alone, vLLM among them, read the zero-padded form that `slm-export padded` makes."
        )
    else:
        lines.append(f"vLLM knows its class as it is:\n\n{code_block(f'vllm serve {place}', 'bash')}")
    if llama_cpp.may_run(description):
        run = "slm-export gguf FOLDER --type q8_0 --out model.gguf\nllama-cli -m model.gguf"
        lines.append(f"llama.cpp, with FOLDER a copy of it:\n\n{code_block(run, 'bash')}")
    else:
        lines.append("llama.cpp has no architecture for it as it is.")
    return "\n\n".join(line.strip() for line in lines)
