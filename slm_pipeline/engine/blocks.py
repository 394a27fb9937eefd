"""Run single blocks on cached residual states, exactly as the model's own forward pass would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from slm_pipeline.models.sizes import MAX_LOGITS, STREAMED_BYTES
from slm_pipeline.models.view import ModelView
from slm_pipeline.models.widths import changes_shapes, resized
from slm_pipeline.surgery.block import Block

GPU_TOKENS, CPU_TOKENS = 8192, 512  # that go through a block at once
_PASS_TOKENS = 8192  # in one forward pass that keeps few states
_NUM_LIKELY = 4096  # tokens of the vocabulary that are likely on a batch
_NO_TARGET = -100  # what cross_entropy passes over


class BlockRunner:
    """The dense model's states on one batch, and a way to continue from any of them.

    The model's own forward pass, with blocks that stand still in the place of all but the first, shows what each block
    is given beside the residual stream (masks, rotary embeddings, positions). So a block can be run on any state
    without knowing its architecture, and no mask is ever rebuilt by hand.

    Args:
        view: the dense model.
        input_ids: [batch, length] int64 token ids, all of equal length: no padding.
        whole: False: leave it at that, on a batch of one sample. There are no states but the first two, and no
            ``final``.

    Attributes:
        states: num_layers + 1 tensors [batch, length, d] in the model's dtype: ``states[i]`` enters block i,
            ``states[-1]`` is the last block's output before the final norm.
        final: [batch, length, d] states after the final norm.
        num_block_evaluations: blocks run since, the recording pass not counted.
    """

    @torch.no_grad()
    def __init__(self, view: ModelView, input_ids: Tensor, *, whole: bool = True):
        self.view = view
        self.final: Tensor
        self.states: list[Tensor] = []
        self.num_block_evaluations = 0
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._resized: tuple[Block, nn.Module] | None = None  # the last block of another size, and a module for it
        blocks = [*view.layers]
        hook = blocks[0].register_forward_hook(self._keep_first, with_kwargs=True)
        try:
            for layer in range(1, len(blocks)):
                view.layers[layer] = _StandsStill(blocks[layer], self)
            view.decoder(input_ids=input_ids.to(view.device), use_cache=False)
        finally:
            hook.remove()
            for layer in range(1, len(blocks)):
                view.layers[layer] = blocks[layer]
        del self._first_output
        if whole:
            _climb([self])

    def _keep_first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._first_output = output
        self.record(args, kwargs)
        self.states += [args[0], output[0] if isinstance(output, tuple) else output]

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what a block is given; returns what the first one returned."""
        self._arguments.append((args[1:], kwargs))
        return self._first_output

    def climb(self, layer: int) -> None:
        """Let the dense model's states go through a block, with the arguments that the model gave it."""
        args, kwargs = self._arguments[layer]
        output = self.view.bring(layer)(self.states[layer], *args, **kwargs)
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def arrive(self) -> None:
        """The states have left the last block."""
        self.final = self.finish(self.states[-1])
        self._arguments_for_any_batch()

    def _arguments_for_any_batch(self) -> None:
        size = len(self.states[0])
        self._arguments = [
            (_for_any_batch(args, size), _for_any_batch(kwargs, size)) for args, kwargs in self._arguments
        ]

    @torch.no_grad()
    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """Output of ``block`` for the residual stream ``hidden`` ([any batch, length, d])."""
        self.num_block_evaluations += 1
        return self._run(block, *self._module_of(block), hidden)

    @torch.no_grad()
    def inputs_of(self, block: Block, hidden: Tensor, sublayer: str) -> Tensor:
        """[tokens, n] inputs of the last projection of ``block``'s sublayer (attention, mlp) for the residual stream
        ``hidden`` ([any batch, length, d]). The block is not run further."""
        return self._inputs(block, hidden, self.view.output_name(sublayer))

    @torch.no_grad()
    def read_by(self, block: Block, hidden: Tensor, sublayer: str) -> Tensor:
        """[tokens, d] what the first projections of ``block``'s sublayer are given, as `inputs_of`."""
        return self._inputs(block, hidden, self.view.reading_names(block.body, sublayer)[0].removesuffix(".weight"))

    def _inputs(self, block: Block, hidden: Tensor, name: str) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].flatten(0, -2))
            raise _Enough

        module, tensors = self._module_of(block)
        hook = module.get_submodule(name).register_forward_pre_hook(stop)
        try:
            with suppress(_Enough):
                self._run(block, module, tensors, hidden)
        finally:
            hook.remove()
        return found[0]

    @torch.no_grad()
    def observed(
        self, block: Block, hidden: Tensor, sublayer: str, *, whole: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`run`, and what goes through the last projection of a sublayer meanwhile.

        Args:
            whole: else the block is not run further.

        Returns:
            Its inputs [tokens, n], what it puts out, what of that reaches the residual stream (the same unless a norm
            stands between), and the output of the block, None unless ``whole``: [any batch, length, d].
        """
        found: list[Tensor] = []
        norm = self.view.output_norm(block.body, sublayer)

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.extend([args[0].flatten(0, -2), output])
            if norm is None and not whole:
                raise _Enough

        def keep_normed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append(output)
            if not whole:
                raise _Enough

        module, tensors = self._module_of(block)
        hooks = [module.get_submodule(self.view.output_name(sublayer)).register_forward_hook(keep)]
        if norm is not None:
            hooks.append(module.get_submodule(norm[0]).register_forward_hook(keep_normed))
        output = None
        try:
            with suppress(_Enough):
                output = self._run(block, module, tensors, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0], found[1].view_as(hidden), found[-1].view_as(hidden), output

    def _module_of(self, block: Block) -> tuple[nn.Module, dict[str, Tensor]]:
        """A module that runs ``block``, and parameters to be put in the place of its own meanwhile."""
        if not block.replaced:
            return self.view.bring(block.body), {}
        absent = {child for sublayer in block.without for child in self.view.sublayer(sublayer)}
        device = self.view.device_of(block.body)
        tensors = {
            name: value.to(device) for name, value in block.replaced.items() if name.partition(".")[0] not in absent
        }
        if not changes_shapes(self.view, block.body, tensors):
            return self.view.bring(block.body), tensors
        if self._resized is None or self._resized[0] is not block:  # some modules ask how many heads they have
            self._resized = (block, resized(self.view, block.body, tensors))
        return self._resized[1], {}

    def _run(self, block: Block, module: nn.Module, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        args, kwargs = self._arguments[block.body]
        with self.view.lacking(block.body, block.without, module):
            if tensors:
                output = functional_call(module, tensors, (hidden, *args), kwargs, tie_weights=False)
            else:
                output = module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def finish(self, hidden: Tensor) -> Tensor:
        """Final-normed states of the last block's output."""
        weight = next(self.view.final_norm.parameters(), None)  # OPT may have none
        normed: Tensor = self.view.final_norm(hidden if weight is None else hidden.to(weight.device))
        return normed

    @torch.no_grad()
    def loss(self, hidden: Tensor, input_ids: Tensor) -> float:
        """Sum of the next-token losses, in nats, of the last block's output ([batch, length, d]) for ``input_ids``."""
        return float(self.losses(hidden, input_ids).sum())

    @torch.no_grad()
    def least_loss(self, hidden: Tensor, input_ids: Tensor) -> float:
        """A number that `loss` is not below, for a part of its cost.

        The normaliser is summed over a part of the vocabulary only: the targets, and what the dense model finds likely
        on this batch.
        """
        targets = input_ids[:, 1:].flatten()
        tokens, targets = torch.cat([self._likely_tokens, targets]).unique(return_inverse=True)
        targets = targets[-input_ids[:, 1:].numel() :]
        normed = self.finish(hidden)[:, :-1].flatten(0, 1)
        rows = max(1, MAX_LOGITS // len(tokens))
        pieces = zip(normed.split(rows), targets.to(normed.device).split(rows), strict=True)
        losses = [_cross_entropy(self.view.logits(piece, tokens), target).sum() for piece, target in pieces]
        return float(torch.stack(losses).sum())

    @cached_property
    def _likely_tokens(self) -> Tensor:
        """Indices of the tokens with the highest mean probability under the dense model."""
        pieces = self.final.flatten(0, 1).split(max_logit_rows(self.view))
        probability = torch.stack([self.view.logits(piece).float().softmax(dim=-1).sum(dim=0) for piece in pieces])
        return probability.sum(dim=0).topk(min(_NUM_LIKELY, self.view.config.vocab_size)).indices.to(self.view.device)

    @torch.no_grad()
    def losses(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Next-token loss in nats, summed over the tokens of each sample: [batch] float64."""
        normed = self.finish(hidden).flatten(0, 1)
        # The last token has no next one. It is run all the same: these are the shapes of the model's own forward pass.
        targets = pad(input_ids[:, 1:], (0, 1), value=_NO_TARGET).flatten().to(normed.device)
        rows = max_logit_rows(self.view)
        pieces = zip(normed.split(rows), targets.split(rows), strict=True)
        losses = torch.cat([_cross_entropy(self.view.logits(piece), target) for piece, target in pieces])
        return losses.view(len(hidden), -1).sum(dim=1)


class _StandsStill(nn.Module):
    """In a block's place: tells the runner what it is given, and returns what the first block did."""

    def __init__(self, block: nn.Module, runner: BlockRunner):
        super().__init__()
        vars(self).update(block=block, runner=runner)  # not as a part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["runner"].record(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """What models ask of their blocks, such as the kind of attention."""
        return getattr(vars(self)["block"], name)


def dense_pass(view: ModelView, parts: Sequence[Tensor]) -> list[BlockRunner]:
    """The dense model's states on each part of a text ([samples, length] int64); all go through one block, then through
    the next."""
    runners = [BlockRunner(view, part, whole=False) for part in parts]
    _climb(runners)
    return runners


def dense_passes(view: ModelView, parts: Sequence[Tensor]) -> Iterator[BlockRunner]:
    """The same, one part after the other, of which nothing is kept; of a model whose blocks stay on disk as many in a
    pass as `parts_together` says."""
    size = parts_together(view, parts, view.num_layers + 1)
    for start in range(0, len(parts), size):
        yield from dense_pass(view, parts[start : start + size])


def parts_together(view: ModelView, parts: Sequence[Tensor], states: int) -> int:
    """How many parts of a text go up the stack together: one, or of a model whose blocks stay on disk, where each pass
    reads all weights, as many as `STREAMED_BYTES` hold with so many ``states`` of each token."""
    if view.stream is None or not parts:
        return 1
    return max(1, STREAMED_BYTES // (parts[0].numel() * states * view.config.hidden_size * view.dtype.itemsize))


@torch.no_grad()
def _climb(runners: Sequence[BlockRunner]) -> None:
    """Let all runners' batches go up the stack together from the second block on."""
    for layer in range(1, runners[0].view.num_layers):
        for runner in runners:
            runner.climb(layer)
    for runner in runners:
        runner.arrive()


def rows_at_once(states: Tensor) -> int:
    """Samples of [any batch, length, d] states that go through a block at once: what keeps a device busy, no more.

    On a processor more than some hundred tokens push one another out of its cache.
    """
    tokens = GPU_TOKENS if states.is_cuda else CPU_TOKENS
    return max(1, tokens // states.shape[1])


def max_logit_rows(view: ModelView) -> int:
    """Tokens whose logits are in memory at a time."""
    return max(1, MAX_LOGITS // view.config.vocab_size)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double()


def _for_any_batch(argument: Any, batch_size: int) -> Any:
    """A recorded argument that broadcasts over any number of samples: they have no padding, so rows are alike."""
    if isinstance(argument, Tensor):
        return argument[:1] if argument.ndim > 1 and len(argument) == batch_size > 1 else argument
    if isinstance(argument, tuple):
        return tuple(_for_any_batch(item, batch_size) for item in argument)
    if isinstance(argument, dict):
        return {name: _for_any_batch(item, batch_size) for name, item in argument.items()}
    return argument


def batches(input_ids: Tensor, max_tokens: int) -> list[Tensor]:
    """Split [N, length] samples into batches of at most ``max_tokens`` tokens, at least one sample each."""
    return list(input_ids.split(max(1, max_tokens // input_ids.shape[1])))


class _Enough(Exception):
    """Stops a forward pass whose rest is not needed."""


@torch.no_grad()
def entering_and_leaving(
    view: ModelView,
    inputs: Mapping[str, Any],
    enter: Collection[int],
    leave: Collection[int],
    arguments_of: Collection[int],
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The residual streams that enter some blocks and leave some, and what else some blocks are given.

    One forward pass, as far as the highest of these blocks.

    Args:
        inputs: of the model's decoder: input_ids [batch, length], attention_mask, position_ids.

    Returns:
        Three dicts by block: [batch, length, d] states, [batch, length, d] states, and the positional and keyword
        arguments beside the state, for that batch alone.
    """
    entering: dict[int, Tensor] = {}
    leaving: dict[int, Tensor] = {}
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    last = max(*leave, *enter, *arguments_of)

    def before(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[layer], arguments[layer] = args[0], (args[1:], kwargs)

    def after(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        leaving[layer] = output[0] if isinstance(output, tuple) else output
        if layer == last:
            raise _Enough

    hooks = [
        view.layers[layer].register_forward_pre_hook(partial(before, layer), with_kwargs=True)
        for layer in {*enter, *arguments_of}
    ]
    hooks += [view.layers[layer].register_forward_hook(partial(after, layer)) for layer in {*leave, last}]
    try:
        with suppress(_Enough):
            view.decoder(**{**inputs, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    return entering, leaving, arguments


@torch.no_grad()
def around(view: ModelView, input_ids: Tensor, start: int, end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a linear map in the place of blocks start .. end - 1 has to do, batch by batch; 1 <= start < end.

    Yields:
        [batch, length, d] each, on one device: the output of the feed-forward network of block start - 1, the residual
        stream that enters block start, and what leaves block end - 1. The pass ends there.
    """
    states: dict[str, Tensor] = {}

    def keep(name: str, stop: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output
            if stop:
                raise _Enough

        return hook

    hooks = [
        view.mlp_output(start - 1).register_forward_hook(keep("output")),
        view.layers[start - 1].register_forward_hook(keep("before")),
        view.layers[end - 1].register_forward_hook(keep("after", stop=True)),
    ]
    try:
        for batch in batches(input_ids.to(view.device), _PASS_TOKENS):
            with suppress(_Enough):
                view.decoder(input_ids=batch, use_cache=False)
            device = states["after"].device
            yield states["output"].view_as(states["before"]).to(device), states["before"].to(device), states["after"]
    finally:
        for hook in hooks:
            hook.remove()
