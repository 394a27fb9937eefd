"""Generation as the efficiency measure times it: a prompt is read, then tokens follow one by one.

``eager`` is ``model.generate``, as the published protocols call it. ``compile`` and ``graph`` decode greedily with a
key-value cache of fixed size, whose step for one token always does the same to the same memory, so that it can be
compiled, or captured once as a CUDA graph and replayed without Python in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from slm_pipeline.errors import UserError
from slm_pipeline.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP = 3  # steps before a capture: libraries choose their kernels and take their memory on first use


class Generation(Protocol):
    """One model, one prompt, and a number of tokens to come."""

    def read(self) -> None:
        """Read the prompt."""

    def run(self) -> Tensor:
        """Read the prompt and generate; [batch, prompt + new] int64 tokens."""


class Reading:
    """A prompt that is read without a cache, for the logits of its last token, where a model can leave out the others.

    Args:
        input_ids: [batch, length] int64, on the model's device.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor):
        self.model, self.input_ids = model, input_ids

    def read(self) -> None:
        self.model(input_ids=self.input_ids, use_cache=False, **_last_logits(self.model))

    def run(self) -> Tensor:
        self.read()
        return self.input_ids


class Generate(Reading):
    """``model.generate``: sampling with top-k 50 and top-p 0.95 at temperature 1, a cache that grows.

    Args:
        new: tokens to generate for each; no end of text comes earlier.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, new: int, pad_token_id: int | None):
        super().__init__(model, input_ids)
        self._mask = torch.ones_like(input_ids)
        generation_config: Any = model.generation_config
        self._settings = GenerationConfig(
            do_sample=True,
            top_k=50,
            top_p=0.95,
            temperature=1.0,
            min_new_tokens=new,
            max_new_tokens=new,
            use_cache=True,
            eos_token_id=generation_config.eos_token_id if generation_config else None,
            pad_token_id=pad_token_id if pad_token_id is not None else 0,
        )

    def run(self) -> Tensor:
        generate: Any = self.model.generate
        tokens: Tensor = generate(input_ids=self.input_ids, attention_mask=self._mask, generation_config=self._settings)
        return tokens


class FixedLayer(CacheLayerMixin):
    """Keys and values of a layer in memory that does not move: as many heads as the layer brings, ``length`` tokens.

    A sliding layer keeps all tokens too; the mask hides those that are out of its sight.

    Args:
        positions: a function that gives the [n] int64 positions of the tokens that are being read.
    """

    is_compileable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, length: int, positions: Callable[[], Tensor]):
        super().__init__()
        self.length, self._positions = length, positions
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.length, key_states.shape[-1])
        self.values = values.new_zeros(*values.shape[:2], self.length, values.shape[-1])
        for buffer in (self.keys, self.values):
            torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self._positions(), key_states)
        self.values.index_copy_(2, self._positions(), value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0  # nobody is to make positions or masks of it: they are given

    def get_max_cache_shape(self) -> int:  # as transformers 4 calls it
        return self.length

    def get_max_length(self) -> int:
        return self.length


class FixedDecoding:
    """Greedy decoding with a cache of fixed size, for any architecture and for layers of unequal width.

    Positions and masks are tensors that the step itself moves on: it asks the host for nothing.

    Args:
        input_ids: [batch, length] int64, on the model's device.
        new: tokens to generate for each.
        wrap: makes of the step, a function of nothing, what is called in its place: `compiled`, `captured`, or None
            for the step as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        new: int,
        wrap: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ):
        self.model, self.input_ids, self.new = model, input_ids, new
        batch, self.read_length = input_ids.shape
        self.length = -(-max(self.read_length + new, _WARM_UP + 1) // 8) * 8  # attention kernels want masks aligned
        device = input_ids.device
        self.tokens = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of ``last``
        self._places = torch.arange(self.length, device=device)
        self._all_read = torch.arange(self.read_length, device=device)
        self._read_now = self._all_read
        for buffer in (self.tokens, self.last, self.position):
            torch._dynamo.mark_static_address(buffer)
        self._windows = ModelView(model).attention_windows()
        layers: list[Any] = [FixedLayer(self.length, lambda: self._read_now) for _ in self._windows]
        self.cache = Cache(layers=layers)
        self._logits = _last_logits(model)
        self._takes_cache_position = "cache_position" in inspect.signature(model.forward).parameters  # transformers 4
        self._step: Callable[[], None] = self.step
        self.read()
        if wrap is not None:
            self.position.zero_()  # the steps that warm up must not leave the cache
            with torch.cuda.device_of(input_ids):  # streams and graphs belong to the current device
                self._step = wrap(self.step)

    def read(self) -> None:
        self._read_now = self._all_read
        self.tokens[:, : self.read_length].copy_(self.input_ids)
        self._advance(self.input_ids)
        self.position.fill_(self.read_length)
        self._read_now = self.position

    def step(self) -> None:
        """Read ``last`` at ``position``; both move on."""
        self.tokens.index_copy_(1, self.position, self.last)
        self._advance(self.last)
        self.position.add_(1)

    def run(self) -> Tensor:
        self.read()
        with torch.cuda.device_of(self.tokens):
            for _ in range(self.new - 1):
                self._step()
        self.tokens.index_copy_(1, self.position, self.last)
        return self.tokens[:, : self.read_length + self.new]

    def _advance(self, tokens: Tensor) -> None:
        positions = self._read_now
        settings = {"cache_position": positions} if self._takes_cache_position else {}
        logits = self.model(
            input_ids=tokens,
            attention_mask=self._masks(positions),
            position_ids=positions[None].expand(len(tokens), -1),
            past_key_values=self.cache,
            use_cache=True,
            **self._logits,
            **settings,
        ).logits
        self.last.copy_(logits[:, -1:].argmax(dim=-1))

    def _masks(self, positions: Tensor) -> Any:
        """What each layer may look at, [1, 1, n, length] added to its scores; by kind where layers differ in it."""
        kinds = sorted({window is not None and window < self.length for window in self._windows})
        masks = {"sliding_attention" if slides else "full_attention": self._mask(positions, slides) for slides in kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, slides: bool) -> Tensor:
        behind = positions[:, None] - self._places  # [n, length]
        seen = behind >= 0
        if slides:
            (window,) = {window for window in self._windows if window is not None}
            seen &= behind < window
        dtype = self.model.dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=positions.device)
        return torch.where(seen, torch.zeros((), dtype=dtype, device=positions.device), hidden)[None, None]


def compiled(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` by ``torch.compile``; on a GPU as CUDA graphs of its parts (``mode="reduce-overhead"``)."""
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    made: Callable[[], None] = torch.compile(_with_own_code(step), mode=mode, dynamic=False)
    for _ in range(_WARM_UP):
        made()
    return made


def _with_own_code(step: Any) -> Callable[[], None]:
    """A method that does the same. torch keeps what it compiles by the code that it is made of, and of one code no more
    than eight: what comes then it runs uncompiled. So the next model would be, and graphs of models that are gone would
    stay in memory."""
    function = step.__func__
    code = function.__code__.replace()
    return MethodType(FunctionType(code, function.__globals__, closure=function.__closure__), step.__self__)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as one CUDA graph.

    Raises:
        UserError: the model asks the host for something in between, so that it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"a step of this model cannot be captured as a CUDA graph ({first_line}): use"
            " evaluation.efficiency.mode=compile or eager"
        ) from error
    return graph.replay


def generation(
    mode: str, model: PreTrainedModel, input_ids: Tensor, new: int, pad_token_id: int | None = None
) -> Generation:
    """The generation of a mode: eager | compile | graph; without ``new`` tokens the prompt is only read."""
    if not new:
        return Reading(model, input_ids)
    if mode == "eager":
        return Generate(model, input_ids, new, pad_token_id)
    return FixedDecoding(model, input_ids, new, {"compile": compiled, "graph": captured}[mode])


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that a token leaves in all layers; a sliding layer forgets those out of its sight."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    cache: Any = model(input_ids=ids, use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // 2


def _last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The option by which a model computes the logits of the last token alone, if it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
