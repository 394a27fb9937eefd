"""Blocks that torch.compile has made kernels for.

What lies between their matrix products (norms, rotary embeddings, the activation times its gate, residuals) takes a
third of a 7B block's time on an H100 when PyTorch runs it piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slm_pipeline.errors import UserError

if TYPE_CHECKING:
    from slm_pipeline.models.context import Context
    from slm_pipeline.models.view import ModelView

# Of one architecture's block: kinds of layers, shapes of batches, parameters put in place of its own.
_MOST_VERSIONS = 64
_BACKEND: Any = "inductor"


def check(option: bool, context: Context) -> None:
    """Raise `UserError` for ``method.compile=true`` where blocks do not stay on one GPU."""
    device = context.config.model.device
    if option and device in ("cpu", "balanced", "stream"):
        raise UserError(
            f"method.compile=true compiles blocks for one GPU, where all of them lie; model.device={device}: use"
            " model.device=cuda, or method.compile=false"
        )


@contextmanager
def blocks_compiled(view: ModelView, wanted: bool) -> Iterator[None]:
    """All blocks run compiled for a while, if ``wanted``; each shape of batch costs some seconds once, after which
    torch finds it in a cache on disk. Hooks on blocks are not compiled.

    Intermediate results are rounded to the model's dtype where PyTorch's own kernels round them, so that similarities
    and losses stay what they are, up to the order of sums within a norm.

    Raises:
        UserError: torch cannot compile here, or more often than makes sense.
    """
    if not wanted:
        yield
        return
    import torch
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    blocks = [*view.layers]
    limits = torch._dynamo.config.patch(recompile_limit=_MOST_VERSIONS, fail_on_recompile_limit_hit=True)
    options: Any = {"emulate_precision_casts": True} if _BACKEND == "inductor" else None
    try:
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False, backend=_BACKEND, options=options)
        with limits:
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        why = " ".join(str(error).split("\n\n")[0].split())  # after it come hints for torch's own developers
        raise UserError(f"method.compile=true: torch cannot compile the blocks here ({why}); leave it out") from error
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
