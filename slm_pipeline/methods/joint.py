"""Joint: depth and width searched together, each candidate judged after a refit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from slm_pipeline.config.ranges import Count, Range
from slm_pipeline.errors import UserError
from slm_pipeline.methods.base import CalibrationSize, ProtectsEnds, PruningProblem
from slm_pipeline.methods.target import Layers, Parameters
from slm_pipeline.show.numerals import count
from slm_pipeline.store.checksums import digest
from slm_pipeline.surgery.ops import Op
from slm_pipeline.surgery.ops.base import SUBLAYERS
from slm_pipeline.surgery.ops.drop import Drop
from slm_pipeline.surgery.ops.drop_sublayer import DropSublayer
from slm_pipeline.surgery.ops.resize import Resize
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from slm_pipeline.engine.candidates import Candidates
    from slm_pipeline.engine.shapes import Fitted, Shape
    from slm_pipeline.engine.window_memo import WindowMemo
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.sizes import Sizes
    from slm_pipeline.surgery.ops import LayerSize

log = logging.getLogger(__name__)

EXPORTS = ("stock", "custom")
UNITS = ("leverage", "obs")
OBJECTIVES = ("kl_both_ways", "kl_divergence", "next_token_loss")
JUDGED = ("repaired", "pruned")
_DIFFER = "method=joint needs layers that are alike; this model's differ in heads or neurons"
_HOURS = 10**12  # parameters of layers times tokens, from which a search takes hours without a GPU
VERSION = 9  # raised when the same candidate gets another number


@dataclass(kw_only=True)
class Joint(ProtectsEnds):
    """Ours: which layers go and how wide the others stay, at one total of parameters.

    A candidate is filled from the lowest layer up: the neurons whose values are most nearly combinations of the others'
    go (as in `nystrom`; ``units=obs``: as in `obs`), and the heads that the others can best make up for; the last
    projections get new weights towards the dense stream, as `repair=refit` gives them, tokens weighted or not, to all
    or to ``shares`` of what is missing; those of a shape that has all sublayers also towards their own output, in the
    ways that refit has for that: whatever is best for the shape whose layers are alike. Its number is the KL divergence
    of its predictions from the dense model's, in nats a token, on samples that nothing was fitted to, read forwards and
    backwards: a fit to one kind of text may be good for that kind alone, and text in reverse is another kind that is
    always at hand. So candidates are compared after repair; the plan holds the decision, ``repair=refit`` the weights.

    ``export=stock``: some layers go, all others lose as many neurons. Which layers: those of ``angular``, of
    ``shortgpt``, and of a greedy search by KL divergence; how many: ``depths`` numbers from none to as many as the
    target has, then their neighbours. ``export=custom``: every sublayer is narrowed alone, to some widths and to none,
    and the KL divergence measured; the least sum of damages, by a Lagrange multiplier, is a candidate. The sum knows
    nothing of how damages add up. So only ``commit`` of the parameters go before the damages are measured again, in the
    model as it is then, refitted; and each time two numbers are searched, uphill and in smaller steps at last: how much
    more a damage counts towards the input, and how much more one of attention. What damages measured once lead to is a
    candidate beside that. Then ``transfers``, from the better one: a sublayer drawn at random gives units, another
    takes what their parameters allow, and the shape stays if it is better, as in EvoPress (2410.14649), whose levels
    change places so. The best of ``export=stock`` is a candidate to the end. Halving between what was found so far: few
    tokens for all, twice as many for the better half, and so on; last, ``swaps`` exchanges of a layer that went for its
    neighbour.

    Of the calibration samples an eighth chooses (ridges, candidates), another eighth does nothing but tell, at the end,
    what the chosen plan does to text that no decision has seen.

    Aiming at a speedup it counts picoseconds of the table of block times in the place of parameters.

    What was measured is kept beside the calibration: a killed search goes on, and those for other ratios share it.

    Scores in the plan: trace, of each candidate gone (layers), heads and neurons (least and most of those that stay),
    shape (groups of heads x neurons of each dense layer, 0x0 of one that is gone), parameters (of the layers), target,
    weighting, share and ridges (of the fits), num_tokens, kl (over all that chooses), or loss, and accepted (whether it
    is the plan's shape); and held_out, kl and same_top_1 of the chosen one on the last eighth.
    """

    # stock: the dense model's class, one width | custom: widths by layer, attention or feed-forward networks may go; a
    # checkpoint brings its own modelling file.
    export: str = "stock"
    # Which neurons go: leverage: whose values are combinations of the others' | obs: that the others best make up for.
    units: str = "leverage"
    # What candidates are judged by: kl_both_ways: on the text, and on it read backwards | kl_divergence: on the text
    # alone | next_token_loss.
    objective: str = "kl_both_ways"
    judged: str = "repaired"  # candidates are judged after a refit | pruned: before it
    ridges: list[Annotated[float, Range(above=0, at_most=1e6)]] = field(default_factory=lambda: [0.1])  # dense stream
    # Of what is missing to the dense stream, tried in the place of all of it, as repair=refit has them.
    shares: list[Annotated[float, Range(above=0, below=1)]] = field(default_factory=lambda: [0.5])
    depths: Annotated[int, Range(at_least=2, at_most=100)] = 5  # stock: numbers of layers that are tried first
    # custom: share of the layers' parameters after which the damages are measured again; 1: they are measured once.
    commit: Annotated[float, Range(above=0, at_most=1)] = 0.1
    search_tokens: Count = 8192  # that the greedy search, or each width of a sublayer, is measured on
    multiple_of: Count = 1  # neurons that stay are a multiple, such as 64
    transfers: Annotated[int, Range(at_least=0, at_most=10_000)] = 8  # custom: tried, of units between two sublayers
    swaps: Annotated[int, Range(at_least=0, at_most=1000)] = 8  # exchanges tried at the end; 0: none
    massive: Annotated[float, Range(above=0, at_most=1e6)] | None = 100.0  # as for obs: neurons that stay; null: off
    published_calibration: CalibrationSize = field(default_factory=lambda: CalibrationSize(64, 512))

    name: ClassVar[str] = "joint"
    targets: ClassVar[tuple[type, ...]] = (Layers, Parameters)
    takes_prices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"export": EXPORTS, "units": UNITS, "objective": OBJECTIVES, "judged": JUDGED}
        for option, known in choices.items():
            if (value := getattr(self, option)) not in known:
                raise UserError(f"method.{option}={value!r} is not one of {', '.join(known)}")
        if not self.ridges:
            raise UserError("method.ridges=[] must name at least one ridge, such as [0.1]")

    def check(self, context: Context) -> None:
        super().check(context)
        if (number := context.config.calibration.num_samples) < 3:
            raise UserError(
                f"calibration.num_samples={number} must be at least 3 for method=joint: it fits, chooses and tells on"
                " different samples"
            )
        if self.objective == "next_token_loss" and context.config.calibration.seq_len < 2:
            raise UserError("calibration.seq_len=1 must be at least 2 for method.objective=next_token_loss")
        if context.source.layers_differ:  # a folder says so; else it is seen when it plans
            raise UserError(_DIFFER)

    def layers_left(self, num_layers: int, target: Layers) -> int | None:
        return None  # known when it has searched

    def memory(self, sizes: Sizes) -> int:
        """`Sizes.fitting` with seven eighths of the text, a second Gram matrix where leverage chooses neurons, its
        inverse where the optimal brain surgeon does; before that a walk that tries every layer on ``search_tokens`` of
        the text that chooses. For widths by layer the states of a batch of it behind all layers; or what leaves eight
        narrowed networks, and the states of a batch in a block, beside two Gram matrices, of all inputs and of those
        that stay."""
        fit_or_choose = sizes.num_samples - sizes.num_samples // min(8, sizes.num_samples)
        number = fit_or_choose + (_num_choosing(sizes.num_samples) if self.objective == "kl_both_ways" else 0)
        more = {"grams": 2} if self.units == "leverage" else {"inverses": 2}
        tokens, at_once = number * sizes.seq_len, sizes.tokens_at_once
        tried = self._tried(sizes)
        beside = max(sizes.fitting(tokens, at_once, **more), tried.walking(sizes.layers))
        if self.export == "custom":
            batch = tried.batch_tokens(2048)
            leaving = tried.states(tried.tokens, 8) + tried.states(batch, 12)
            variants = sizes.fitting(tokens, at_once, grams=2) + leaving
            beside = max(beside, variants, tried.states(batch, sizes.layers + 1))
        return beside

    def host_memory(self, sizes: Sizes) -> int:
        """The blocks of the model that a search for widths by layer goes on from, with its states on the text that
        damages are measured on, or the plan's."""
        states = self._tried(sizes).states(self._tried(sizes).tokens, sizes.layers) if self.export == "custom" else 0
        return sizes.item_bytes * sizes.layers * sizes.block_matrices + states

    def _tried(self, sizes: Sizes) -> Sizes:
        """With the text that damages are measured on."""
        choose = _num_choosing(sizes.num_samples) * (2 if self.objective == "kl_both_ways" else 1)
        return replace(sizes, num_samples=min(choose, max(1, self.search_tokens // sizes.seq_len)))

    @property
    def _criterion(self) -> str:
        return "next_token_loss" if self.objective == "next_token_loss" else "kl_divergence"

    def plan(self, problem: PruningProblem[Layers | Parameters]) -> Plan:
        from slm_pipeline.engine.candidates import Candidates
        from slm_pipeline.engine.refit import Refit
        from slm_pipeline.engine.shapes import Fitting
        from slm_pipeline.surgery.apply import layer_sizes

        view, sizes = problem.view, layer_sizes(problem.view)
        if len({(size.heads, size.neurons) for size in sizes}) > 1:
            raise UserError(_DIFFER)
        remove = problem.target.remove
        if isinstance(problem.target, Layers):
            remove = remove * sum(size.whole for size in sizes) // len(sizes)
        if view.device.type == "cpu" and sum(size.whole for size in sizes) * problem.input_ids.numel() > _HOURS:
            log.warning(
                "joint: without a GPU a search of this model with %s tokens takes hours; experiment=joint_two_cores is"
                " a small one",
                count(problem.input_ids.numel()),
            )
        fit, choose, tell = _parts(problem.input_ids)
        choose = _both_ways(choose) if self.objective == "kl_both_ways" else choose
        fitting = Fitting(
            view, fit, choose, sizes, Refit(ridges=self.ridges), units=self.units, fixed=self._massive(problem),
            objective=self._criterion, refitted=self.judged == "repaired",
        )  # fmt: skip
        layers = self.candidates(len(sizes))
        with self._memo(problem) as memo:
            alike = self._uniform(problem.prices or sizes, [], remove)
            search = Candidates(fitting, memo).filled_best(alike, self.shares)
            best = self._stock(problem, search, remove)
            if self.export == "custom":
                best = self._custom(problem, search, remove, best)
            if best is None:
                raise _cannot_go(problem, remove)
            best = search.ranked([best, alike] if alike else [best], divisor=1)[0]
            best = search.swapped(best, layers, self.swaps, problem.prices)
            found = search.fitting.fill(best, search.num_samples(1))
        kl, same = search.fitting.judge(found, tell)
        log.info("joint: KL from the dense model %.4f on text that chose nothing", kl)
        return self._shape_plan(problem, found, search.trace, {"kl": kl, "same_top_1": same})

    @contextmanager
    def _memo(self, problem: PruningProblem) -> Iterator[WindowMemo]:
        options = {
            name: value for name, value in self.options().items() if name not in ("depths", "transfers", "swaps")
        }
        with problem.windows.open("joint", digest([VERSION, options])[:12]) as memo:
            yield memo

    def _massive(self, problem: PruningProblem) -> dict[int, Tensor]:
        """Of each layer the neurons that write more than ``massive`` times the mean energy of their layer's."""
        if self.massive is None:
            return {}
        view, statistics = problem.view, problem.statistics
        found = {}
        for layer in range(view.num_layers):
            weight = view.mlp_output(layer).get_parameter("weight").detach().float().cpu()
            square = statistics.mlp_variance[layer] + statistics.mlp_mean[layer].square()
            energy = square * weight.square().sum(dim=0)
            found[layer] = energy > self.massive * energy.mean()
        return {layer: fixed for layer, fixed in found.items() if fixed.any()}

    def _stock(self, problem: PruningProblem, search: Candidates, remove: int) -> Shape | None:
        """The best of the candidates with one width for all layers that stay; None if there is none."""
        sizes = problem.prices or search.fitting.sizes
        block = max(1, sum(size.whole for size in sizes) // len(sizes))
        limit = max(0, len(self.candidates(len(sizes))) - 1)
        most = min(remove // block, limit)
        orders = self._orders(problem, search, most)
        numbers = sorted({round(most * step / (self.depths - 1)) for step in range(self.depths)})

        def shapes(counts: Sequence[int], names: Sequence[str]) -> dict[tuple[int, str], Shape]:
            found = {
                (count, name): self._uniform(sizes, orders[name][count], remove) for count in counts for name in names
            }
            return {key: shape for key, shape in found.items() if shape is not None}

        first = shapes(numbers, list(orders))
        if not first and most < limit:  # neurons are too few, or take no time: one more layer goes
            most += 1
            orders = self._orders(problem, search, most)
            first = shapes([most], list(orders))
        if not first:
            return None
        ranked = search.ranked(list(first.values()), divisor=4)
        near: list[Shape] = []
        for key in [key for key, shape in first.items() if shape in ranked[:2]]:
            counts = [count for count in (key[0] - 1, key[0] + 1) if 0 <= count <= most]
            near += shapes(counts, [key[1]]).values()
        return search.halved([*ranked[:6], *near])

    def _orders(self, problem: PruningProblem, search: Candidates, most: int) -> dict[str, dict[int, list[int]]]:
        """For each way to choose them, the layers that go, by their number."""
        from slm_pipeline.engine.walk import Removal, RemovalWalk

        depth = len(search.fitting.sizes)
        candidates, statistics = self.candidates(depth), problem.statistics
        numbers = range(most + 1)
        influence = [1 - float(statistics.cosine[layer, layer + 1]) for layer in range(depth)]
        by_influence = sorted(candidates, key=lambda layer: influence[layer])

        def block(number: int) -> list[int]:
            starts = [s for s in candidates if s + number - 1 in candidates] if number else []
            start = min(starts, key=lambda s: float(statistics.angle_last[s, s + number]), default=0)
            return list(range(start, start + number))

        found = {
            "shortgpt": {number: by_influence[:number] for number in numbers},
            "angular": {number: block(number) for number in numbers},
        }
        rows = max(1, self.search_tokens // problem.input_ids.shape[1])
        known = [int(search.memo["greedy", step]) for step in range(most) if ("greedy", step) in search.memo]
        if most and len(known) < most:
            walk = RemovalWalk(problem.view, search.fitting.choose[:rows], criterion=self._criterion)
            for layer in known:
                walk.remove(Removal(layer))
            left = [Removal(layer) for layer in candidates if layer not in known]
            for step, one in enumerate(walk.greedily(left, most - len(known)), start=len(known)):
                search.memo.add(("greedy", step), one.removed.layer)
                known.append(one.removed.layer)
        found["greedy"] = {number: known[:number] for number in numbers}
        return found

    def _uniform(self, sizes: Sequence[LayerSize], gone: Sequence[int], remove: int) -> Shape | None:
        """The shape without these layers whose others lose as many neurons as are still to go; None if they cannot.

        With ``export=custom`` without those that are protected, and what is too much goes back to the first."""
        narrow = set(range(len(sizes)) if self.export == "stock" else self.candidates(len(sizes))) - {*gone}
        missing = remove - sum(sizes[layer].whole for layer in gone)
        neurons = sizes[0].neurons
        if not narrow:
            return None
        fewer = max(0, -(-missing // sum(sizes[layer].per_neuron for layer in narrow)))
        width = (neurons - fewer) // self.multiple_of * self.multiple_of
        width = neurons if fewer == 0 else width
        if width < 1:
            return None
        left = {layer: width if layer in narrow else neurons for layer in range(len(sizes))}
        if self.export == "custom":
            missing -= sum((neurons - left[layer]) * sizes[layer].per_neuron for layer in narrow)
            for layer in sorted(narrow):
                back = min(self.multiple_of, neurons - left[layer])
                if back * sizes[layer].per_neuron <= -missing:
                    left[layer] += back
                    missing += back * sizes[layer].per_neuron
        return tuple((0, 0) if layer in gone else (size.heads, left[layer]) for layer, size in enumerate(sizes))

    def _custom(self, problem: PruningProblem, search: Candidates, remove: int, stock: Shape | None) -> Shape | None:
        """The best of the candidates with widths by layer, ``stock`` among them; None if there is none."""
        from slm_pipeline.engine.widths import Widths

        sizes = problem.prices or search.fitting.sizes
        widths = Widths(search, sizes, self.candidates(len(sizes)), remove, self.multiple_of, self.search_tokens)
        if not widths.possible:
            return stock
        near = search.ranked([*widths.committed(self.commit), *widths.committed(1.0)], divisor=4)[:3]
        if not near:
            return stock
        near = search.ranked(near, divisor=2)[:2]
        moved = widths.transferred(near[0], self.transfers)
        return search.ranked([moved, *near, *([stock] if stock else [])], divisor=1)[0]

    def _shape_plan(
        self,
        problem: PruningProblem,
        found: Fitted,
        trace: list[dict[str, Any]],
        held_out: dict[str, float],
    ) -> Plan:
        from slm_pipeline.engine.candidates import shape_in_words

        shape = found.shape
        trace = [{**row, "accepted": row["shape"] == shape_in_words(shape)} for row in trace]
        gone = tuple(layer for layer, kept in enumerate(shape) if kept == (0, 0))
        ops: list[Op] = [Drop(gone)] if gone else []
        tensors: dict[str, Any] = {}
        units = {"attention": "heads", "mlp": "neurons"}
        for layer in (layer for layer in range(len(shape)) if layer not in gone):
            kept = {units[part]: found.kept[layer, part] for part in SUBLAYERS if (layer, part) in found.kept}
            if kept:
                heads, neurons = (len(kept[name]) if name in kept else None for name in units.values())
                ops.append(Resize((layer,), f"resize.{layer}", heads, neurons))
                tensors |= {f"resize.{layer}.{name}": stay.numpy() for name, stay in kept.items()}
            for part, number in zip(SUBLAYERS, shape[layer], strict=True):
                if number == 0:
                    ops.append(DropSublayer((layer,), part, "custom"))
        return self.new_plan(problem, ops=ops, tensors=tensors, scores={"trace": trace, "held_out": held_out})


def _cannot_go(problem: PruningProblem, remove: int) -> UserError:
    if problem.prices is None:
        return UserError(f"method=joint: {count(remove)} parameters cannot go; ask for a lower pruning_ratio")
    return UserError(
        f"method=joint: {remove / 1e9:.4g} ms of a token's time cannot go; ask for a lower pruning_ratio.speedup"
    )


def _parts(input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples to fit, to choose and to tell: of every eight the first six, the seventh and the last; of fewer the last
    two."""
    import torch

    period = min(8, len(input_ids))
    place = torch.arange(len(input_ids)) % period
    fit, choose, tell = (input_ids[of] for of in (place < period - 2, place == period - 2, place == period - 1))
    choose, fit = _apart(choose, tell), _apart(fit, torch.cat([choose, tell]))
    return fit, choose, tell


def _num_choosing(num_samples: int) -> int:
    """Samples that choose, of so many: see `_parts`."""
    return max(1, (num_samples + 1) // min(8, num_samples))


def _both_ways(samples: Tensor) -> Tensor:
    """Each sample, and behind it the same one with its tokens in reverse: text of another kind, in which words follow
    no order that was fitted to. The first token stays, since it may be the one that every text begins with."""
    import torch

    backwards = torch.cat([samples[:, :1], samples[:, 1:].flip(1)], dim=1)
    return torch.stack([samples, backwards], dim=1).flatten(0, 1)


def _apart(samples: Tensor, others: Tensor) -> Tensor:
    """Those samples that share no 31 tokens in a row with others: what is cut at random from one text may overlap. All,
    with a warning, where none would be left."""
    import torch

    width = min(16, samples.shape[1])
    factors = torch.randint(1, 2**31, (width,), generator=torch.Generator().manual_seed(0))
    every, some = ((of.unfold(1, width, step) * factors).sum(dim=-1) for of, step in ((others, 1), (samples, width)))
    apart = ~torch.isin(some, every).any(dim=1)
    if not bool(apart.any()):
        log.warning("joint: all calibration samples overlap, so that what it measures favours what it has seen")
        return samples
    return samples[apart]
