"""Refit: new weights for the last projections of every layer above the first change, by least squares."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from slm_pipeline.config.ranges import Range
from slm_pipeline.data.calibration import near_characters
from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.repair.base import Repair, RepairProblem, extended
from slm_pipeline.store.files import write_json
from slm_pipeline.store.unfinished import forget
from slm_pipeline.surgery.ops import Op
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.correct import Correct
from slm_pipeline.surgery.ops.replace import Replace
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine import refit as engine
    from slm_pipeline.engine.refit import Fitted
    from slm_pipeline.engine.streams import Streams
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.surgery.apply import PlannedBlocks

    _Walked = tuple[list[Op], dict[str, np.ndarray], list[dict[str, Any]]]

log = logging.getLogger(__name__)

STEPS = ("weightings", "ridges", "shares", "targets", "priors", "reads")  # what is tried, in this order
CHOICES = {
    "weighting": ("either", "inverse_square", "none"),
    "target": ("either", "dense_stream", "own_output"),
    "prior": ("either", "weights", "own_output"),
    "sublayers": ("both", *SUBLAYERS),
    "choice": ("stack", "projection"),
}


@dataclass(kw_only=True)
class Refit(Repair):
    """Ours. The pruned model is walked from the input up, beside the dense one.

    From the first layer that the plan changed on, each layer b stands for the dense layers b to next - 1: with those
    that went above it, and those that were merged into it. Its last projections W get new weights, attention before
    the feed-forward network:

        W' = (T D X' + lam W) (X D X' + lam I)^-1,   lam = ridge x mean diagonal of X D X',

    with X what enters the projection in the pruned model, repaired below; T what is missing to the dense stream behind
    the attention of layer b, or behind layer next - 1 where the layer's last sublayer writes; and D = 1 / mean square
    of that dense state for each token, because states are normed before they are read and few tokens are very large. A
    bias is fitted as the weight of an input of 1; none is added. A part of the samples, of one long text its last part,
    is held out of all fits: a projection whose error there becomes no less keeps its weights. With the middle one of
    the ridges the walk is made with D and with all tokens alike; in the better way with the other ridges. What is taken
    is always the walk after which the whole model's KL divergence from the dense one is least there. With
    ``choice=projection`` there is one walk in the place of one for each ridge, and the ridge is the one with the least
    error, projection by projection, which is not best for the stack when much has gone. If in the end the KL divergence
    is not less by ``least_gain`` of what it was, nothing is changed: what is won there may be lost on text of another
    kind.

    Then the best walk is made again for each of ``shares``, with T that share of what is missing and for the rest the
    own output (see below); and the best of all, for each of ``reads``, with what the sublayers read corrected as well.
    Where the pruned stream still differs from the dense one, a sublayer reads x in the place of h (behind the norm in
    front of it); the map M nearest to H = M X, by least squares with the ridge towards the identity, goes into its
    first projections: W' = W M. Again what is no better on the text held out is left alone, and so is the whole if the
    KL divergence is.

    With ``target=own_output`` T is instead what the projection would write if its sublayer were as in the dense model,
    on the states that reach it in the pruned one: that makes up for narrower layers, and not for those that went. It
    corrects less, and of what it corrects more can be predicted, so that it wins where tokens are few for a layer's
    neurons. Hence ``either``: where every sublayer is still there, walks towards it (ridges 0.01 and 0.1) are tried
    too, with D and with all tokens alike: what one sublayer puts out need not be as large as the stream is, and on some
    models (Gemma 3) the fit that forgets no token is the better one. What is read is corrected after such fits, and
    before those to the stream. ``shares`` lie between: each layer makes up for a part of what those below it have
    missed, as far as it can tell, and the next ones for as much of the rest.

    Where heads or neurons went and the best walk is one to the stream, it is made once more with the ridge towards the
    weights that make up best for those units, in the place of the weights as they are (``prior``): the ridge is then
    about what was missed below alone.

    Kin: the direct form of ReplaceMe's map (arXiv 2505.02819), and fits to the dense output on corrected inputs as in
    GPTAQ (arXiv 2504.02692).

    Where a norm stands behind the last projections (Gemma 2 and 3, OLMo 2), its gains are counted as part of W, and
    what it divides each token by is taken to stay. It does not: what can be predicted in part only is written too
    large. So the gains are fitted after W, channel by channel; where heads or neurons went, fits to the own output are
    tried as well.

    Memory beside the dense model: four states of each token, the Gram matrix of one projection in float64 with a few
    matrices of that size, and on the host the new weights in float32. A killed repair goes on after its last layer; the
    layers of two walks at most lie on the disk meanwhile, those of the best and of the one that is made.

    Scores in the plan: repair, with num_tokens and num_held_out; divergence, for the model pruned and repaired the KL
    divergence in nats and the share of tokens with the dense model's most likely next one, on the text held out, alike
    where the weights stay; weightings, ridges, shares, targets, priors and reads, the KL divergence with each that was
    tried for all; and layers, for each layer by its lowest original what became of its projections.
    """

    ridges: list[Annotated[float, Range(above=0, at_most=1e6)]] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    # Ridges with which what sublayers read is corrected too, after the best of `ridges` is known; []: it is not.
    reads: list[Annotated[float, Range(above=0, at_most=1e6)]] = field(default_factory=lambda: [0.1, 1.0])
    # How much a token counts: inverse_square | none: all alike | either: both, with the middle ridge.
    weighting: str = "either"
    # dense_stream | own_output: what a projection is to write | either, for the whole stack, where units alone went.
    target: str = "either"
    # Shares of what is missing to the dense stream that are tried in the place of all of it; []: none.
    shares: list[Annotated[float, Range(above=0, below=1)]] = field(default_factory=lambda: [0.5])
    # What the ridge draws to: the weights | own_output: of narrowed sublayers, those that make up best for what went |
    # either: both, with the best way to the dense stream.
    prior: str = "either"
    sublayers: str = "both"  # both | attention | mlp: whose last projections get new weights
    choice: str = "stack"  # stack | projection: whether one ridge is chosen for all, or one for each projection
    # Share by which the KL divergence must fall on the text held out: less may be a rise on text of another kind.
    least_gain: Annotated[float, Range(at_least=0, below=1)] = 0.03
    held_out: Annotated[float, Range(above=0, below=1)] = 0.2  # share of the samples that nothing is fitted to

    name: ClassVar[str] = "refit"
    streams: ClassVar[bool] = True
    shares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in CHOICES.items():
            if getattr(self, option) not in allowed:
                raise UserError(f"repair.{option}={getattr(self, option)!r} is not one of {', '.join(allowed)}")
        if not self.ridges:
            raise UserError("repair.ridges=[] must name at least one ridge, such as [0.1]")
        if self.prior == self.target == "own_output":
            raise UserError(
                "repair.prior=own_output with repair.target=own_output: what fits are made to draws them already; leave"
                " the prior at weights"
            )
        if self.calibration.num_samples < 2:
            raise UserError("repair.calibration.num_samples=1 must be at least 2: one sample is held out")

    def memory(self, sizes: Sizes) -> int:
        """All layers being fitted: `Sizes.fitting` with all of its text."""
        return sizes.fitting(sizes.tokens, sizes.tokens_at_once)

    def host_memory(self, sizes: Sizes) -> int:
        """The new weights in float32, those of the best walk and of one more: last projections, and with ``reads`` two
        maps [hidden, hidden] of each layer."""
        projections = sizes.layers * sizes.hidden * (sizes.queries + sizes.neurons)
        maps = 2 * sizes.layers * sizes.hidden**2 if self.reads else 0
        two_ways = "either" in (self.target, self.weighting)
        walks = (len(self.ridges) if self.choice == "stack" else 1) + two_ways + len(self.shares) + len(self.reads)
        return 4 * (min(2, walks) * projections + maps)

    def repair(self, problem: RepairProblem) -> Plan:
        from slm_pipeline.engine.refit import Refit as HowToRefit
        from slm_pipeline.engine.streams import Streams, first_changed, pass_all
        from slm_pipeline.surgery.apply import PlannedBlocks

        view, plan = problem.view, problem.plan
        blocks, groups = PlannedBlocks(plan, view), plan.layer_groups
        if first_changed(blocks, groups, view.num_layers) is None:
            return plan
        to_fit, held_out = self._split(problem)
        pruned = pass_all(Streams(view, held_out), blocks, groups).divergence()
        tried: dict[str, dict[str, float]] = {}
        found_kl: dict[str, float] = {}
        best: _Walk | None = None
        failure = None
        prefix = _free_prefix(plan)
        number = sum(len(self._walks(step, HowToRefit(), plan)) for step in STEPS) - 1  # one ridge twice
        numbers = (f"refit {this} of {number}" for this in itertools.count(1))

        def go(walk: _Walk, name: str) -> None:
            fitted, other = Streams(view, to_fit), Streams(view, held_out)
            walk.found = self._walk(walk, fitted, other, blocks, groups, name)
            walk.divergence = other.divergence()

        for step in STEPS:
            for name, how in self._walks(step, None if best is None else best.how, plan):
                walk = _Walk(problem, prefix, how)
                if walk.name in found_kl:  # the ridge that weightings were tried with
                    tried.setdefault(step, {})[name] = found_kl[walk.name]
                    continue
                desc = next(numbers)
                walk.divergence = walk.known()
                if walk.divergence is None:
                    try:
                        go(walk, desc)
                    except UserError as error:  # a ridge too small to solve leaves the others
                        failure = error
                        log.warning("refit: %s %s: %s", step, name, error)
                        continue
                    walk.note()
                tried.setdefault(step, {})[name] = found_kl[walk.name] = walk.kl
                worse = walk if best is not None and walk.kl >= best.kl else best
                best = walk if worse is not walk else best
                if worse is not None:
                    worse.forget()
        if best is None:
            assert failure is not None
            raise failure
        if best.found is None:  # an attempt before this one has walked so
            go(best, "refit, what was best")
        assert best.found is not None
        repaired, (ops, tensors, layers) = best.divergence, best.found
        assert repaired is not None
        divergence = {
            name: {"kl": kl, "same_top_1": same} for name, (kl, same) in (("pruned", pruned), ("repaired", repaired))
        }
        found = {
            "name": self.name,
            "num_tokens": to_fit.numel(),
            "num_held_out": held_out.numel(),
            "divergence": divergence,
            **{step: tried.get(step, {}) for step in STEPS},
            "layers": layers,
        }
        log.info("refit: KL from the dense model %.4f -> %.4f on text held out", pruned[0], repaired[0])
        scores = {**plan.scores, "repair": found}
        if self.prior == "own_output" and not _has_lost_units(plan):
            line = "repair.prior=own_output does nothing here: no layer that stays has lost heads or neurons"
            scores["warnings"] = [*scores.get("warnings", []), line]
        if repaired[0] >= (1 - self.least_gain) * pruned[0]:
            divergence["repaired"] = divergence["pruned"]  # for that is what the model is
            line = (
                f"repair=refit: on the text held out the KL divergence from the dense model is {repaired[0]:.4g} with"
                f" new weights and {pruned[0]:.4g} without, not {self.least_gain:.0%} less (repair.least_gain), so the"
                " weights stay; more of repair.calibration may help"
            )
            if not ops:
                line = "repair=refit: no new weights do better on the text held out, so the weights stay"
            return extended(plan, scores={**scores, "warnings": [*scores.get("warnings", []), line]})
        return extended(plan, ops=[*plan.ops, *ops], tensors={**plan.tensors, **tensors}, scores=scores)

    def _split(self, problem: RepairProblem) -> tuple[Tensor, Tensor]:
        """The samples to fit to, and those held out: at even distances; of one long text, where samples may overlap,
        its last part, and what reaches into that is used for neither.

        Raises:
            UserError: nothing is left to fit to.
        """
        import torch

        num_samples, seq_len = problem.input_ids.shape
        number = min(max(1, round(self.held_out * num_samples)), num_samples - 1)
        chosen = torch.zeros(num_samples, dtype=torch.bool)
        starts, width = [place["start"] for place in problem.places if place.keys() == {"start"}], seq_len
        if not starts:  # a very long text's begin at characters, and end where only its tokens tell
            starts = [place["character"] for place in problem.places if "character" in place]
            width = near_characters(seq_len)
        if len(starts) < num_samples:
            chosen[(2 * torch.arange(number) + 1) * num_samples // (2 * number)] = True
            return problem.input_ids[~chosen], problem.input_ids[chosen]
        places = torch.tensor(starts)
        chosen[places.argsort(stable=True)[-number:]] = True
        fitted = places + width <= places[chosen].min()
        if not bool(fitted.any()):
            raise UserError(
                f"repair.calibration: all of its {num_samples} samples of {seq_len} tokens overlap with those held out;"
                " use a longer text or a smaller repair.calibration.seq_len"
            )
        return problem.input_ids[fitted], problem.input_ids[chosen]

    def _walks(self, step: str, best: engine.Refit | None, plan: Plan) -> list[tuple[str, engine.Refit]]:
        """What is tried in a step, by its name in the scores; ``best`` is the best way so far, None if none did."""
        from slm_pipeline.engine.refit import WEIGHTINGS, own_output
        from slm_pipeline.engine.refit import Refit as HowToRefit

        sublayers = SUBLAYERS if self.sublayers == "both" else (self.sublayers,)
        target = "dense_stream" if self.target == "either" else self.target
        weightings = WEIGHTINGS if self.weighting == "either" else (self.weighting,)
        prior = "weights" if self.prior == "either" else self.prior
        by_ridge = [[ridge] for ridge in self.ridges] if self.choice == "stack" else [self.ridges]
        if step == "weightings":
            how = HowToRefit(sorted(by_ridge)[len(by_ridge) // 2], target=target, prior=prior, sublayers=sublayers)
            return [(weighting, replace(how, weighting=weighting)) for weighting in weightings]
        if step == "ridges":
            how = best or HowToRefit(weighting=weightings[0], target=target, prior=prior, sublayers=sublayers)
            hows = [replace(how, ridges=ridges) for ridges in by_ridge]
            return [(_in_words(how), how) for how in hows]
        if step == "shares" and best is not None and target == "dense_stream":
            return [(f"{share:g}", replace(best, share=share)) for share in self.shares]
        if step == "targets" and self.target == "either" and _has_all_sublayers(plan):
            own = own_output(weightings, by_projection=self.choice == "projection", sublayers=sublayers)
            return [(f"own_output, {_in_words(how)}", how) for how in own]
        if step == "priors" and best is not None and self.prior == "either" and _has_lost_units(plan):
            return [("own_output", replace(best, prior="own_output"))] if best.target == "dense_stream" else []
        if step == "reads" and best is not None:
            return [(f"{reads:g}", replace(best, reads=reads)) for reads in self.reads]
        return []

    def _walk(
        self,
        walk: _Walk,
        fitted: Streams,
        other: Streams,
        blocks: PlannedBlocks,
        groups: list[list[int]],
        name: str,
    ) -> _Walked:
        """The operations that put new weights in, their tensors, and what became of each layer; both streams are at the
        top then."""
        from slm_pipeline.engine.streams import first_changed, spans
        from slm_pipeline.show.progress import ProgressBar

        problem, prefix = walk.problem, walk.prefix
        first = first_changed(blocks, groups, problem.view.num_layers)
        ops: list[Op] = []
        tensors: dict[str, np.ndarray] = {}
        layers: list[dict[str, Any]] = []
        dense_layers = spans(groups, problem.view.num_layers)
        with _in_the_background() as call:
            for position, (block, span) in enumerate(zip(ProgressBar(blocks, desc=name), dense_layers, strict=True)):
                for streams in (fitted, other):
                    streams.look_ahead(*span)
                if first is not None and position >= first:
                    layer = groups[position][0]
                    kept = walk.kept(layer)
                    if ranks.of_first(ranks.is_first() and kept.is_there):
                        weights, what = kept.read()
                    else:  # each process solves for itself what all have summed
                        weights, what = _as_kept(walk.how.layer(fitted, other, block)[1])
                        if ranks.is_first():
                            call(kept.write, weights, what)
                    of_layer = {f"{prefix}.{layer}.{key}": value for key, value in weights.items()}
                    for op in _ops(layer, f"{prefix}.{layer}", weights):
                        block = op.apply(problem.view, [block], of_layer) or block
                        ops.append(op)
                    tensors |= of_layer
                    layers.append({"layer": layer, "projections": what})
                for streams in (fitted, other):
                    streams.pass_through(block)
        return ops, tensors, layers


def _has_lost_units(plan: Plan) -> bool:
    """Whether a layer that stays has lost heads or neurons."""
    return any(isinstance(op, Resize) for op in plan.ops)


def _has_all_sublayers(plan: Plan) -> bool:
    """Whether all layers have all sublayers still, and something in them is not the dense model's."""
    layers = plan.layers()
    return len(layers) == plan.model["num_layers"] and not any(layer.missing for layer in layers) and bool(plan.ops)


def _in_words(how: engine.Refit) -> str:
    return ", ".join(map("{:g}".format, how.ridges)) + (", all tokens alike" if how.weighting == "none" else "")


def _free_prefix(plan: Plan) -> str:
    """What no name of the plan's tensors begins with: it may have been refitted before."""
    prefixes = itertools.chain(["refit"], (f"refit_{number}" for number in itertools.count(2)))
    return next(prefix for prefix in prefixes if not any(name.startswith(f"{prefix}.") for name in plan.tensors))


@contextmanager
def _in_the_background() -> Iterator[Callable[..., None]]:
    """What runs a function beside what comes next, once the one before has ended, whose errors it raises. At the end
    all have."""
    running: Future[None] | None = None

    def call(function: Callable[..., None], *arguments: Any) -> None:
        nonlocal running
        if running is not None:
            running.result()
        running = pool.submit(function, *arguments)

    with ThreadPoolExecutor(max_workers=1) as pool:
        yield call
    if running is not None:
        running.result()


def _as_kept(found: list[Fitted]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The new weights in float32, and what became of each sublayer as JSON."""
    tensors = {name: value for of_one in found for name, value in of_one.tensors.items()}
    weights = {name: value.float().cpu().contiguous().numpy() for name, value in tensors.items()}
    return weights, [of_one.as_json() for of_one in found]


@dataclass
class _Walk:
    """A walk up the stack, whose layers' new weights lie in the folder of an attempt until a better walk is known, so
    that the next attempt goes on from there.

    Attributes:
        divergence: of the model that it led to; None before.
        found: what it led to, unless it was an earlier attempt's.
    """

    problem: RepairProblem
    prefix: str
    how: engine.Refit
    divergence: tuple[float, float] | None = None
    found: _Walked | None = None

    @property
    def kl(self) -> float:
        assert self.divergence is not None
        return self.divergence[0]

    @property
    def name(self) -> str:
        how = self.how
        words = ["_".join(map(str, how.ridges))]
        words += [] if how.reads is None else [f"reads_{how.reads}"]
        words += [] if how.target == "dense_stream" else [how.target]
        words += [] if how.share == 1 else [f"share_{how.share}"]
        words += [] if how.weighting == "inverse_square" else [how.weighting]
        words += [] if how.prior == "weights" else [f"prior_{how.prior}"]
        return f"layers/{self.prefix}_" + "_".join(words)

    def kept(self, layer: int) -> _Kept:
        return _Kept(self.problem, f"{self.name}/{layer}")

    def known(self) -> tuple[float, float] | None:
        """The divergence that an earlier attempt has noted."""
        record = self.problem.out / f"{self.name}.json"
        kl, same = math.nan, math.nan
        if ranks.is_first() and record.is_file():
            kl, same = json.loads(record.read_text(encoding="utf-8"))
        kl, same = ranks.of_first(kl), ranks.of_first(same)
        return None if math.isnan(kl) else (kl, same)

    def note(self) -> None:
        """Keep the divergence: the walk has come to its end."""
        if ranks.is_first():
            record = f"{self.name}.json"
            write_json(self.problem.out / record, self.divergence)
            self.problem.note_complete(record)

    def forget(self) -> None:
        """Let go of its new weights: another walk is better."""
        self.found = None
        if ranks.is_first():
            forget(self.problem.out, self.name)


@dataclass(frozen=True)
class _Kept:
    """A layer's new weights in the folder of an attempt."""

    problem: RepairProblem
    name: str

    @property
    def _files(self) -> tuple[str, str]:
        return f"{self.name}.safetensors", f"{self.name}.json"

    @property
    def is_there(self) -> bool:
        return all((self.problem.out / file).is_file() for file in self._files)

    def write(self, weights: dict[str, np.ndarray], what: list[dict[str, Any]]) -> None:
        from safetensors.numpy import save_file

        tensors, record = (self.problem.out / file for file in self._files)
        tensors.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, tensors)
        write_json(record, what)
        self.problem.note_complete(*self._files)

    def read(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        from safetensors.numpy import load_file

        tensors, record = (self.problem.out / file for file in self._files)
        return load_file(tensors), json.loads(record.read_text(encoding="utf-8"))


def _ops(layer: int, prefix: str, kept: Collection[str]) -> list[Op]:
    """Operations on one layer, that take these of its tensors from the plan."""
    reads = tuple(part for part in SUBLAYERS if f"reads.{part}" in kept)
    writes = tuple(part for part in SUBLAYERS if part in kept)
    biases = tuple(part for part in SUBLAYERS if f"{part}_bias" in kept) or None
    norms = tuple(part for part in SUBLAYERS if f"{part}_norm" in kept) or None
    ops: list[Op] = [Correct((layer,), reads, f"{prefix}.reads")] if reads else []
    return [*ops, Replace((layer,), writes, prefix, biases=biases, norms=norms)] if writes else ops
