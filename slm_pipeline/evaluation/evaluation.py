"""The ``evaluation`` group as an object: which models are scored, by which measures."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from slm_pipeline.config import TARGETS, EvaluationConfig, checked
from slm_pipeline.config.groups import build
from slm_pipeline.errors import UserError
from slm_pipeline.evaluation.measure import Measure
from slm_pipeline.models.context import Context


@dataclass(frozen=True)
class Evaluation:
    """Which models are scored, and by what.

    Attributes:
        options: those that measures share by interpolation, and ``of``.
        measures: by the key in ``evaluation`` under which their options stand.
    """

    options: EvaluationConfig
    measures: Mapping[str, Measure]
    _identities: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, node: Any) -> Evaluation:
        """The group's object.

        Raises:
            UserError: a key that no measure has, a wrong type or range, or two numbers of one name.
        """
        if not isinstance(node or {}, Mapping):
            raise UserError(f"evaluation={node!r} must be one of the options in conf/evaluation")
        values = {str(key): value for key, value in (node or {}).items()}
        nodes = {key: value for key, value in values.items() if isinstance(value, Mapping) and "_target_" in value}
        plain = {key: value for key, value in values.items() if key not in nodes}
        known = [*EvaluationConfig.__dataclass_fields__, *nodes]
        for key in plain:
            if key not in EvaluationConfig.__dataclass_fields__:
                if isinstance(plain[key], Mapping):
                    raise UserError(
                        f"evaluation.{key} has options and is no measure that was chosen; to choose it too:"
                        f" measure=[{','.join([*nodes, key])}]"
                    )
                near = difflib.get_close_matches(key, known, n=3)
                raise UserError(
                    f"evaluation.{key} does not exist; {'did you mean' if near else 'there are'}"
                    f" {', '.join(f'evaluation.{name}' for name in near or known)}?"
                )
        options = checked(EvaluationConfig, plain, "evaluation")
        for target in options.of:
            if target not in TARGETS:
                raise UserError(f"evaluation.of has {target!r}; allowed: {', '.join(TARGETS)}")
        measures = {key: build(value, group="measure", key=f"evaluation.{key}") for key, value in nodes.items()}
        for key, measure in measures.items():
            if key != measure.name:
                raise UserError(
                    f"evaluation.{key} holds the measure {measure.name}; its options belong under"
                    f" evaluation.{measure.name}: its YAML begins with # @package evaluation.{measure.name}"
                )
        owners: dict[str, str] = {}  # of labels: results and numbers go by these
        for measure in measures.values():
            for label in [
                *map(measure.label, measure.parts()),
                *(measure.names_of_totals() if measure.parts() else []),
            ]:
                if (owner := owners.setdefault(label, measure.name)) != measure.name:
                    raise UserError(
                        f"evaluation.{owner} and evaluation.{measure.name} both call a number {label}: give the measure"
                        " of your own another name, or leave one of them out"
                    )
        return cls(options, measures)

    @property
    def of(self) -> list[str]:
        """The models that are scored, in their order."""
        return [target for target in TARGETS if target in self.options.of]

    @property
    def active(self) -> list[Measure]:
        """The measures that have something to measure."""
        return [measure for measure in self.measures.values() if measure.parts()] if self.of else []

    def parts(self, target: str) -> Iterator[tuple[Measure, str]]:
        """Every measure with each of its parts that is measured of a model."""
        for measure in self.active:
            if target in self.of and target in measure.of:
                for part in measure.parts():
                    yield measure, part

    def keys(self, target: str) -> dict[str, bool]:
        """The keys after the model's of the numbers to come; False where a part's label is all that is known before."""
        found: dict[str, bool] = {}
        for measure, part in self.parts(target):
            names = measure.names(part)
            label = measure.label(part)
            found |= {label: False} if names is None else {"/".join(filter(None, [label, n])): True for n in names}
        for measure in self.active:
            if target in measure.of:
                found |= dict.fromkeys(measure.names_of_totals(), True)
        return found

    def check(self, context: Context) -> None:
        """Raise `UserError` for what would end the stage and can be known without a tokenizer or a model."""
        if "evaluate" not in context.config.stages:
            return
        for measure in self.active:
            measure.check(context)
            for part in measure.parts():
                self._identities[measure.label(part)] = measure.identity(part, context)

    def warnings(self, context: Context) -> list[str]:
        """What may not be as meant although it can be measured."""
        measures = self.active if "evaluate" in context.config.stages else []
        return [warning for measure in measures for warning in measure.warnings(context)]

    def identity(self) -> dict[str, Any]:
        """What each part's numbers depend on, by its label; known once it is checked."""
        return self._identities
