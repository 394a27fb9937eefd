"""Models whose decoder blocks stay on disk: ``model.device=stream``.

The weights of the blocks are memory-mapped safetensors files. A block that is to run is copied to where it runs, the
one above it is copied meanwhile, and what ran before is let go: two blocks are in memory at a time, however many there
are. Everything else of the model, embeddings, final norm and head, is loaded as usual.

Code that looks at weights, and not at states, reads the mapped ones, as if the whole model were in main memory.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from slm_pipeline.config import ModelConfig
from slm_pipeline.errors import UserError
from slm_pipeline.models import fault_words, folder
from slm_pipeline.models.checked import is_finite
from slm_pipeline.models.json_files import read_json
from slm_pipeline.models.stored_tensors import Stored, check_stored_as, find, stored_tensors
from slm_pipeline.models.view import ModelView

log = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READERS = 4  # threads that copy the tensors of a block


class LayerStream:
    """The blocks of one model, of which the one that runs and the next are in memory.

    Args:
        model: its blocks' parameters are mapped tensors, or such as have been put in their place since.
        device: where blocks run.
        files: what the mapped tensors lie in.
        place: how messages call the model.

    Attributes:
        blocks: input side first.
        num_read: blocks copied to where they run, so far; said in the log whenever the top of the stack is reached.
    """

    def __init__(self, model: Any, device: torch.device, files: Files, place: str):
        self.device = device
        self.blocks: list[nn.Module] = [*ModelView(model).layers]
        self._model = model
        self._files = files
        self._place = place
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="layer_stream")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._checked: set[int] = set()
        self.num_read = 0
        self._present: nn.Module | None = None
        self._homes: list[tuple[nn.Parameter, Tensor]] = []  # of the present block: parameters, and what they were
        self._ahead: tuple[nn.Module, dict[nn.Parameter, Future[Tensor]]] | None = None
        self._hooks = [
            block.register_forward_pre_hook(lambda module, args: self.enter(module)) for block in self.blocks
        ]

    def enter(self, block: nn.Module) -> None:
        """Let ``block`` be the one that is there; nothing is done for a module that is no block of the model.

        Raises:
            UserError: a weight is not a finite number.
        """
        if block is self._present:
            return
        above = iter([*self.blocks, None])
        if not any(layer is block for layer in above):
            return
        coming = self._coming(block)
        self.leave()
        self._homes = [(parameter, parameter.data) for parameter in coming]
        for parameter, future in coming.items():
            value = future.result()
            if self._side is not None:  # it was made on another stream and may be freed while this one still reads it
                value.record_stream(torch.cuda.current_stream(self.device))
            parameter.data = value
        self._present = block
        self.num_read += 1
        if block is self.blocks[-1]:
            log.info("%s: %d blocks read", self._place, self.num_read)
        if (following := next(above, None)) is not None:
            self._ahead = (following, self._start(following))

    def leave(self) -> None:
        """Let go of the block that is there, and of the next: all parameters are mapped ones, which may be replaced."""
        for parameter, home in self._homes:
            parameter.data = home
        self._homes, self._present = [], None
        for future in self._ahead[1].values() if self._ahead is not None else ():
            future.cancel()
        self._ahead = None

    def close(self) -> None:
        """Let go of everything; the model is not run again."""
        self.leave()
        self._readers.shutdown()

    def release(self) -> None:
        """Leave the blocks to whoever puts their weights where they are to be: they stay mapped and run where they are
        put. Not all of them have been checked for numbers that are not finite."""
        self.close()
        for hook in self._hooks:
            hook.remove()
        del self._model.layer_stream

    def _coming(self, block: nn.Module) -> dict[nn.Parameter, Future[Tensor]]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is block and set(ahead[1]) == set(_parameters(block)):
            return ahead[1]
        return self._start(block)

    def _start(self, block: nn.Module) -> dict[nn.Parameter, Future[Tensor]]:
        return {parameter: self._readers.submit(self._read, parameter) for parameter in _parameters(block)}

    @torch.no_grad()
    def _read(self, parameter: nn.Parameter) -> Tensor:
        """A copy where blocks run."""
        home = parameter.data
        if self._side is None:
            value = home.clone()
        else:
            with torch.cuda.stream(self._side):
                value = home.to(self.device)
        if id(parameter) not in self._checked:
            with torch.cuda.stream(self._side):  # does nothing without one
                if not is_finite(value):
                    names = [name for name, own in self._model.named_parameters() if own is parameter]
                    raise UserError(f"{self._place}: {fault_words.not_finite(names, str(value.dtype))}")
            self._checked.add(id(parameter))
        self._files.let_go(home)
        return value


def _parameters(block: nn.Module) -> Iterator[nn.Parameter]:
    """Not those that a search has put something else in the place of, for a while."""
    return (parameter for parameter in block.parameters() if isinstance(parameter, nn.Parameter))


class Files:
    """Safetensors files, mapped into memory."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}  # by address: file, first and last byte

    def tensor(self, stored: Stored) -> Tensor:
        """The values as they lie in the file, which nobody changes. Not to be written to: `let_go` forgets what was."""
        if stored.file not in self._maps:
            with open(stored.file, "rb") as handle:
                self._maps[stored.file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped, dtype = self._maps[stored.file], DTYPES[stored.dtype]
        if not stored.num_bytes:
            return torch.empty(stored.shape, dtype=dtype)
        count = stored.num_bytes // dtype.itemsize
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=stored.start).view(stored.shape)
        self._places[tensor.data_ptr()] = (mapped, stored.start, stored.start + stored.num_bytes)
        return tensor

    def let_go(self, tensor: Tensor) -> None:
        """Take a mapped tensor's pages off this process; they are read again when they are looked at."""
        if tensor.data_ptr() in self._places:
            mapped, start, end = self._places[tensor.data_ptr()]
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            if (whole := end // mmap.PAGESIZE * mmap.PAGESIZE - first) > 0:
                mapped.madvise(mmap.MADV_DONTNEED, first, whole)


def load_streamed(model_class: Any, place: Path, config: ModelConfig, device: torch.device) -> Any:
    """A model of a folder, in evaluation mode, its blocks on disk and the rest on ``device``.

    Args:
        model_class: ``AutoModelForCausalLM``, or a class of `modeling_pruned`.

    Raises:
        UserError: a tensor is missing, of another shape, or of another type than ``model.dtype``, or not finite.
    """
    settings = _described(model_class, place, config)
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with init_empty_weights():
        model = make(settings, dtype=getattr(torch, config.dtype))
    view, files = ModelView(model), Files()
    is_tied = bool(settings.tie_word_embeddings) and not folder.has_own_head(place)
    in_blocks = {id(parameter) for parameter in view.layers.parameters()}
    wrong = []
    for name, stored in _found(view, place, config, is_tied).items():
        value = mapped = files.tensor(stored)
        if id(model.get_parameter(name)) not in in_blocks:
            value = mapped.to(device, copy=True)
            files.let_go(mapped)
            wrong += [] if is_finite(value) else [name]
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._parameters[own] = nn.Parameter(value, requires_grad=False)
    if wrong:
        raise UserError(f"{place}: {fault_words.not_finite(wrong, config.dtype)}")
    if is_tied:
        cast(Any, view.head).weight = model.get_input_embeddings().weight
    for part in model.modules():
        part._buffers = {
            name: buffer if buffer is None else buffer.to(device) for name, buffer in part._buffers.items()
        }
    model.config.tie_word_embeddings = is_tied
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    model.layer_stream = LayerStream(model, device, files, str(place))
    return model.eval()


def _described(model_class: Any, place: Path, config: ModelConfig) -> Any:
    if hasattr(model_class, "config_class") and model_class.config_class is not None:
        return model_class.config_class.from_pretrained(place)
    return AutoConfig.from_pretrained(place, trust_remote_code=config.trust_remote_code)


def _found(view: ModelView, place: Path, config: ModelConfig, is_tied: bool) -> dict[str, Stored]:
    """Where the files hold each of the model's parameters, by name; of a head that is the embedding nowhere."""
    tensors = stored_tensors(place, read_json(place / "config.json"), [], [])
    embedding, head = view.model.get_input_embeddings().weight, cast(Any, view.head).weight
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in view.model.named_parameters()
        if parameter is embedding or not (is_tied and parameter is head)
    }
    found = {name: stored for name in wanted if (stored := _stored(name, view, tensors)) is not None}
    missing = [name for name in wanted if name not in found]
    shapes = {name: (stored.shape, wanted[name]) for name, stored in found.items() if stored.shape != wanted[name]}
    if problems := [*([fault_words.lacking(missing)] if missing else []), *fault_words.unequal(shapes)]:
        raise UserError(f"{place}: {'; '.join(problems)}")
    check_stored_as(found.values(), config)
    return found


def _stored(name: str, view: ModelView, tensors: Mapping[str, Stored]) -> Stored | None:
    """The tensor of a parameter; a head may go by its architecture's name for it."""
    is_head = view.model.get_parameter(name) is cast(Any, view.head).weight
    return find(name, tensors) or (find(f"{view.architecture.head}.weight", tensors) if is_head else None)
