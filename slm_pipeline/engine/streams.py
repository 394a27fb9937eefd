"""A pruned model walked beside the dense one, and the sums over tokens of which least squares makes new weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear

from slm_pipeline.engine.blocks import BlockRunner, max_logit_rows, rows_at_once
from slm_pipeline.engine.layerwise import Stream
from slm_pipeline.engine.least_squares import Gram, full_float32, is_finite
from slm_pipeline.errors import UserError
from slm_pipeline.machine.ranks import Share
from slm_pipeline.models.view import ModelView
from slm_pipeline.surgery.block import Block
from slm_pipeline.surgery.ops.replace import written


@dataclass(frozen=True)
class Sums:
    """Sums over tokens for one projection W with inputs X [n, tokens], targets T [d, tokens] and weights D of tokens.

    Attributes:
        gram: [n, n] X D X'.
        moment: [d, n] T D X'.
        energy: tr(T D T').
        plain: X X' without the input that a bias has, all tokens alike, if it was asked for.
    """

    gram: Tensor
    moment: Tensor
    energy: float
    plain: Tensor | None = None

    def error(self, weight: Tensor) -> float:
        """The weighted squared error of ``weight`` [d, n], relative to the targets' energy."""
        weight = weight.to(self.gram)
        square = (weight @ self.gram * weight).sum() - 2 * (weight * self.moment).sum()
        return (float(square) + self.energy) / max(self.energy, 1e-30)

    def of(self, kept: Tensor) -> Sums:
        """Those of some of the inputs alone: [kept] int64."""
        kept = kept.to(self.gram.device)
        return Sums(self.gram[kept][:, kept], self.moment[:, kept], self.energy)


@dataclass(frozen=True)
class GainSums:
    """Sums over tokens for the gains of a norm, channel by channel: [d] float64, of the squares of what they multiply,
    of its products with what is wanted, and the gains as they are."""

    square: Tensor
    product: Tensor
    gains: Tensor

    def solve(self, ridge: float) -> Tensor:
        """The best gains, drawn to those that there are by ``ridge`` times the mean square; [d] float64."""
        penalty = max(ridge * float(self.square.mean()), 1e-30)
        return (self.product + penalty * self.gains) / (self.square + penalty)


class _SumsSoFar:
    """`Sums` while tokens come in: products in float32, added up in float64."""

    def __init__(self) -> None:
        self._gram: Gram | None = None
        self._moment: Tensor | None = None
        self._energy = 0.0

    def gather(self, share: Share) -> None:
        """Add what the other processes have taken in."""
        assert self._gram is not None
        assert self._moment is not None
        self._gram.matrix = share.summed(self._gram.matrix)
        self._moment = share.summed(self._moment)
        self._energy = float(share.summed(torch.tensor(self._energy, dtype=torch.float64)))

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Take in [tokens, n], [tokens, d] and [tokens]."""
        if self._gram is None or self._moment is None:
            self._gram = Gram(inputs.shape[1], inputs.device)
            size = targets.shape[1], inputs.shape[1]
            self._moment = torch.zeros(size, dtype=torch.float64, device=inputs.device)
        self._gram.add(inputs, weights)
        weighted = targets * weights[:, None]
        with full_float32():
            self._moment += weighted.T @ inputs.float()
        self._energy += float((weighted.double() * targets.double()).sum())

    def sums(self, not_finite: str) -> Sums:
        """What has come in. Raises `UserError` with these words if it is not finite."""
        assert self._gram is not None
        assert self._moment is not None
        sums = Sums(self._gram.matrix, self._moment, self._energy)
        if not (math.isfinite(sums.energy) and is_finite(sums.gram) and is_finite(sums.moment)):
            raise UserError(f"{not_finite}; try model.dtype=float32")
        return sums


@dataclass(frozen=True)
class _Writes:
    """Of a sublayer's last projection: inputs [tokens, n], what it puts out, what of that reaches the stream, what is
    wanted there [tokens, d], and what tokens count [tokens]."""

    inputs: Tensor
    put_out: Tensor
    written: Tensor
    wanted: Tensor
    weights: Tensor


class Streams:
    """The residual streams of N samples in the dense and in the pruned model, at one place of the stack.

    Processes that work together have a part of the samples each; all sums are over all samples, and the same in each.

    In memory: two states of each token, two more from `look_ahead` to `pass_through`, and what `sums` returns.

    Args:
        view: the dense model; never changed.
        input_ids: [N, length] int64 tokens.

    Attributes:
        dense, pruned: [N, length, d] states in the model's dtype, of this process's samples; the same tensor while the
            models are alike.
        middle, leaving: the dense stream after the attention of the layer that `look_ahead` began with, and after the
            last layer that it passed.
    """

    def __init__(self, view: ModelView, input_ids: Tensor):
        self.view = view
        self._share = Share.of(len(input_ids))
        self._num_tokens = input_ids.numel()
        input_ids = input_ids[self._share.numbers.start : self._share.numbers.stop]
        self.dense = self.pruned = Stream(view, input_ids).states
        self.middle = self.leaving = self.dense
        self._runner = BlockRunner(view, input_ids[:1], whole=False)
        self._passed = (0, 0)  # the dense layers between the two ends of the streams

    def look_ahead(self, start: int, end: int) -> None:
        """Let the dense stream go through dense layers ``start`` to ``end`` - 1, and keep what it was."""
        self._passed = (start, end)
        self.middle = torch.empty_like(self.dense)
        self.leaving = torch.empty_like(self.dense)
        for rows in self._rows():
            middle = states = self._on_device(self.dense[rows], start)
            if self.lacks(Block(start), "attention"):
                states = self._runner.run(Block(start), states)
            else:
                _, _, written, leaving = self._runner.observed(Block(start), states, "attention")
                assert leaving is not None
                middle, states = middle + written, leaving
            self.middle[rows] = middle
            self.leaving[rows] = states
        for layer in range(start + 1, end):
            for rows in self._rows():
                self.leaving[rows] = self._runner.run(Block(layer), self._on_device(self.leaving[rows], layer))

    def sums(
        self, block: Block, sublayer: str, *, target: str, weighting: str, share: float = 1.0, plain: bool = False
    ) -> Sums:
        """What a least-squares fit of a sublayer's last projection is made of; a bias counts as a last input of 1.

        The target is what is missing to the dense stream behind the attention, or behind the layers that the block
        stands for where its last sublayer writes; with ``own_output`` what the projection would write if the sublayer
        were as in the dense model, on the states that reach it; with ``as_it_is`` what it does write.

        Where a norm stands between the projection and the stream (Gemma 2 and 3, OLMo 2), the norm's gains are counted
        as part of the weights, and what it divides each token by is taken to stay what it is: the target is multiplied
        by that. How good such a fit is only `errors` say, since it does not stay so.

        Args:
            share: of what is missing to the dense stream; the rest of the target is the own output.
            plain: whether the Gram matrix of all tokens alike is wanted too.

        Raises:
            UserError: they are not finite.
        """
        has_bias = self.bias(block, sublayer) is not None
        norm = self.output_norm(block, sublayer)
        so_far, alike = _SumsSoFar(), None
        is_plain = weighting == "none" and norm is None and not has_bias
        for writes in self._writes(block, sublayer, target, weighting, share):
            if plain and not is_plain:
                alike = alike or Gram(writes.inputs.shape[1], writes.inputs.device)
                alike.add(writes.inputs)
            inputs, divisors = writes.inputs, torch.ones_like(writes.wanted[:, :1])
            if norm is not None:
                put_out = writes.put_out * _invertible(norm[1])
                divisors = put_out.norm(dim=-1, keepdim=True) / writes.written.norm(dim=-1, keepdim=True)
                divisors = divisors.nan_to_num(1.0, posinf=1.0).clamp_min(1e-12)
            if has_bias:
                inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
            so_far.add(inputs, writes.wanted * divisors, writes.weights / divisors[:, 0].square())
        so_far.gather(self._share)
        sums = so_far.sums(
            f"what enters the last projection of layer {block.body}'s {sublayer}, or is to leave it, is not finite"
        )
        if not plain:
            return sums
        return replace(sums, plain=sums.gram if alike is None else self._share.summed(alike.matrix))

    def errors(
        self, blocks: Sequence[Block], sublayer: str, *, target: str, weighting: str, share: float = 1.0
    ) -> list[float]:
        """The weighted squared error of what reaches the stream, relative to what is wanted, in one pass for blocks
        that are alike but for what `put` and `put_gains` change; targets as for `sums`."""
        found = torch.zeros(len(blocks) + 1, dtype=torch.float64)
        for writes in self._writes(blocks[0], sublayer, target, weighting, share):
            weights = writes.weights[:, None]
            others = (self._written(block, sublayer, writes.inputs) for block in blocks[1:])
            missed = (written - writes.wanted for written in (writes.written, *others))
            for place, of in enumerate((*missed, writes.wanted)):
                found[place] += float((weights * of.square()).sum(dtype=torch.float64))
        *missed_in_all, energy = self._share.summed(found).tolist()
        return [missed / max(energy, 1e-30) for missed in missed_in_all]

    def _written(self, block: Block, sublayer: str, inputs: Tensor) -> Tensor:
        """[tokens, d] float32: what of a last projection that reads ``inputs`` [tokens, n] reaches the stream."""
        bias = self.bias(block, sublayer)
        weight = block.parameter(self.view, f"{self.view.output_name(sublayer)}.weight")
        output = linear(inputs, weight.to(inputs), None if bias is None else bias.to(inputs))
        if (norm := self.output_norm(block, sublayer)) is not None:
            module = self.view.bring(block.body).get_submodule(norm[0])
            gains = block.parameter(self.view, f"{norm[0]}.weight").to(inputs)
            output = functional_call(module, {"weight": gains}, (output,))
        return output.float()

    def gain_sums(self, block: Block, sublayer: str, *, target: str, weighting: str, share: float = 1.0) -> GainSums:
        """What the gains of a norm behind a sublayer's last projection are fitted by; targets as for `sums`."""
        norm = self.output_norm(block, sublayer)
        assert norm is not None
        gains = _invertible(norm[1])
        square, product = (torch.zeros(len(gains), dtype=torch.float64, device=gains.device) for _ in range(2))
        for writes in self._writes(block, sublayer, target, weighting, share):
            normed, weights = writes.written / gains, writes.weights[:, None]
            square += (weights * normed.square()).sum(dim=0, dtype=torch.float64)
            product += (weights * normed * writes.wanted).sum(dim=0, dtype=torch.float64)
        return GainSums(self._share.summed(square), self._share.summed(product), norm[1].double())

    def _writes(self, block: Block, sublayer: str, target: str, weighting: str, share: float) -> Iterator[_Writes]:
        """What a sublayer's last projection does and what it is to do, some tokens at a time."""
        is_last = sublayer == "mlp" or self.lacks(block, "mlp")
        whole = self.undone(block, sublayer)
        for rows in self._rows():
            entering = self._on_device(self.pruned[rows], block.body)
            inputs, output, written, leaving = self._runner.observed(block, entering, sublayer, whole=sublayer == "mlp")
            reference = self._on_device((self.leaving if is_last else self.middle)[rows], block.body)
            wanted = written
            if whole is not block and (target == "own_output" or (target == "dense_stream" and share < 1)):
                wanted = self._runner.observed(whole, entering, sublayer, whole=False)[2]
            if target == "dense_stream":  # the first difference rounds back to the state that the output was added to
                beside = entering if leaving is None else leaving - written
                wanted = torch.lerp(wanted.float(), reference.float() - beside.float(), share)
            weights = reference.flatten(0, -2).float().square().mean(dim=-1).clamp_min(1e-12).reciprocal()
            if weighting == "none":
                weights = torch.ones_like(weights)
            put_out, reached, wanted = (of.flatten(0, -2).float() for of in (output, written, wanted))
            yield _Writes(inputs, put_out, reached, wanted, weights)

    def reading_sums(self, block: Block, sublayer: str) -> Sums:
        """What the best linear map is made of, from what a sublayer reads in the pruned model, X, to what it reads in
        the dense one at the same place, T, both behind the norm in front of it. A token counts 1 / mean square of T.

        Raises:
            UserError: they are not finite.
        """
        so_far = _SumsSoFar()
        for rows in self._rows():
            pruned, dense = (self._on_device(states[rows], block.body) for states in (self.pruned, self.dense))
            inputs = self._runner.read_by(block, pruned, sublayer)
            wanted = self._runner.read_by(Block(block.body), dense, sublayer).float()
            weights = wanted.square().mean(dim=-1).clamp_min(1e-12).reciprocal()
            so_far.add(inputs, wanted, weights)
        so_far.gather(self._share)
        return so_far.sums(f"what layer {block.body}'s {sublayer} reads is not finite")

    def lacks(self, block: Block, sublayer: str) -> bool:
        """Whether a sublayer is gone, by the plan or in the dense model already."""
        return sublayer in block.without or self.view.lacks(block.body, sublayer)

    def undone(self, block: Block, sublayer: str) -> Block:
        """The block with one sublayer as in the dense model; itself if it is."""
        children = self.view.sublayer(sublayer)
        others = {name: value for name, value in block.replaced.items() if name.partition(".")[0] not in children}
        return block if len(others) == len(block.replaced) else replace(block, replaced=others)

    def weight(self, block: Block, sublayer: str) -> Tensor:
        """[d, n] float64 of a sublayer's last projection; its bias, if it has one, as a last column, and its rows
        multiplied by the gains of a norm behind it."""
        device = self.view.device_of(block.body)
        weight = block.parameter(self.view, f"{self.view.output_name(sublayer)}.weight").to(device).double()
        if (bias := self.bias(block, sublayer)) is not None:
            weight = torch.cat([weight, bias.to(device).double()[:, None]], dim=1)
        norm = self.output_norm(block, sublayer)
        return weight if norm is None else weight * _invertible(norm[1]).to(weight)[:, None]

    def bias(self, block: Block, sublayer: str) -> Tensor | None:
        name = f"{self.view.output_name(sublayer)}.bias"
        own = getattr(self.view.layers[block.body].get_submodule(self.view.output_name(sublayer)), "bias", None)
        return block.parameter(self.view, name) if name in block.replaced or own is not None else None

    def put(self, block: Block, sublayer: str, weight: Tensor) -> Block:
        """The block with another last projection, as `weight` gives it."""
        name = self.view.output_name(sublayer)
        if (norm := self.output_norm(block, sublayer)) is not None:
            weight = weight / _invertible(norm[1]).to(weight)[:, None]
        if self.bias(block, sublayer) is None:
            return written(self.view, block, {f"{name}.weight": weight})
        return written(self.view, block, {f"{name}.weight": weight[:, :-1], f"{name}.bias": weight[:, -1]})

    def output_norm(self, block: Block, sublayer: str) -> tuple[str, Tensor] | None:
        """As of the view, with the gains that the block has."""
        norm = self.view.output_norm(block.body, sublayer)
        if norm is None or (weight := block.replaced.get(f"{norm[0]}.weight")) is None:
            return norm
        return norm[0], weight.to(norm[1]) + self.view.architecture.gain_offset

    def put_gains(self, block: Block, sublayer: str, gains: Tensor) -> Block:
        """The block with other gains [d] in the norm behind a sublayer's last projection."""
        norm = self.output_norm(block, sublayer)
        assert norm is not None
        return written(self.view, block, {f"{norm[0]}.weight": gains - self.view.architecture.gain_offset})

    def new_tensors(self, before: Block, after: Block, sublayer: str) -> dict[str, Tensor]:
        """What a plan needs to make one of the other, where a sublayer's last projection is new: see `engine.refit`."""
        output, norm = self.view.output_name(sublayer), self.output_norm(after, sublayer)
        tensors = {sublayer: after.parameter(self.view, f"{output}.weight")}
        if self.bias(after, sublayer) is not None:
            tensors[f"{sublayer}_bias"] = after.parameter(self.view, f"{output}.bias")
        if norm is not None and after.replaced.get(name := f"{norm[0]}.weight") is not before.replaced.get(name):
            tensors[f"{sublayer}_norm"] = after.replaced[name]
        return tensors

    def pass_through(self, block: Block) -> None:
        """Let the pruned stream go through ``block``, and the dense one take up what `look_ahead` found."""
        is_dense = not (block.replaced or block.without) and range(*self._passed) == range(block.body, block.body + 1)
        if self.pruned is self.dense and is_dense:
            self.dense = self.pruned = self.middle = self.leaving
            return
        self.dense = self.middle = self.leaving
        block = block.on(self.view.device_of(block.body))
        passed = torch.empty_like(self.pruned)
        for rows in self._rows():
            passed[rows] = self._runner.run(block, self._on_device(self.pruned[rows], block.body))
        self.pruned = passed

    def divergence(self) -> tuple[float, float]:
        """At the top of the stack: mean over tokens of the KL divergence of the pruned model's next-token distribution
        from the dense one's, in nats, and the share of tokens whose most likely next one is the same.

        Raises:
            UserError: the former is not finite.
        """
        view, rows = self.view, max_logit_rows(self.view)
        total = same = 0.0
        with torch.no_grad():
            for piece in self._rows():
                pairs = [self._runner.finish(states[piece]).flatten(0, 1) for states in (self.dense, self.pruned)]
                for dense, pruned in zip(*(states.split(rows) for states in pairs), strict=True):
                    dense, pruned = (view.logits(states).float().log_softmax(dim=-1) for states in (dense, pruned))
                    total += float((dense.exp() * (dense - pruned)).sum(dtype=torch.float64))
                    same += float((dense.argmax(dim=-1) == pruned.argmax(dim=-1)).sum())
        total, same = self._share.summed(torch.tensor([total, same], dtype=torch.float64)).tolist()
        if not math.isfinite(total):
            raise UserError(
                "the KL divergence of the pruned model's predictions from the dense model's is not finite; try"
                " model.dtype=float32"
            )
        return total / self._num_tokens, same / self._num_tokens

    def loss(self, input_ids: Tensor) -> float:
        """At the top of the stack: mean next-token loss of the pruned model on these tokens, in nats."""
        assert not self._share.divided  # else only some of them went up
        targets = input_ids.to(self.view.device)
        total = sum(self._runner.loss(self.pruned[rows], targets[rows]) for rows in self._rows())
        return total / targets[:, 1:].numel()

    def _rows(self) -> list[slice]:
        step = rows_at_once(self._on_device(self.dense[:1], 0))
        return [slice(start, start + step) for start in range(0, len(self.dense), step)]

    def _on_device(self, states: Tensor, layer: int) -> Tensor:
        return states.to(self.view.device_of(layer))


def _invertible(gains: Tensor) -> Tensor:
    """The gains, none nearer to 0 than a ten thousandth of the largest."""
    least = 1e-4 * gains.abs().max()
    return torch.where(gains.abs() < least, torch.where(gains < 0, -least, least), gains)


def spans(originals: Sequence[Sequence[int]], num_layers: int) -> list[tuple[int, int]]:
    """For each layer of a pruned model the dense layers that it stands for, as (first, one past the last).

    Layers that are gone belong to the layer below them, or to the lowest if there is none: what that one's attention is
    to write is taken behind the attention of the dense model's first layer, what it is to read from the embedding.

    Args:
        originals: for each layer of the pruned model those that it was made of.
    """
    starts = [0, *(min(members) for members in originals[1:])]
    return list(zip(starts, [*starts[1:], num_layers], strict=True))


def first_changed(blocks: Iterable[Block], originals: Sequence[Sequence[int]], num_layers: int) -> int | None:
    """Position of the first layer of a pruned model that differs from the dense one's, or above which layers went;
    None if there is none.

    Args:
        originals: for each layer of the pruned model those that it was made of.
        num_layers: of the dense model.
    """
    for position, (block, (start, end)) in enumerate(zip(blocks, spans(originals, num_layers), strict=True)):
        if block.replaced or block.without or block.body != start or end - start > 1:
            return position
    return None


def pass_all(streams: Streams, blocks: Iterable[Block], originals: Sequence[Sequence[int]]) -> Streams:
    """The streams at the top of the stack, the pruned one having gone through ``blocks``."""
    for block, span in zip(blocks, spans(originals, streams.view.num_layers), strict=True):
        streams.look_ahead(*span)
        streams.pass_through(block)
    return streams
