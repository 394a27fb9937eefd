"""The searches as their authors run them, to be measured beside ours.

Faithful in their cost (whole-model copies, whole forward passes, one sample at a time, tokens x tokens matrices), not
in their faults: similarities are in float32, every layer is scored on its true output, the configuration is that of
our method. So both sides decide on the same grounds and their decisions can be compared.

Each function takes the problem and the method's options and returns its decision: layers in the order of removal, or
windows that are merged. None of it uses the engine that it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slm_pipeline.commands.published.come import come
from slm_pipeline.commands.published.copying import laco, slm
from slm_pipeline.commands.published.finercut import finercut
from slm_pipeline.commands.published.mka import mka
from slm_pipeline.commands.published.one_pass import angular, replaceme, shortened_taylor, shortgpt, streamline
from slm_pipeline.commands.published.removal import shortened_ppl, sleb
from slm_pipeline.methods.angular import AngularDistance
from slm_pipeline.methods.base import PruningProblem
from slm_pipeline.methods.come import Come, ComePosterior
from slm_pipeline.methods.finercut import FinerCut
from slm_pipeline.methods.laco import Laco
from slm_pipeline.methods.mka import Mka
from slm_pipeline.methods.replaceme import ReplaceMe
from slm_pipeline.methods.shortened import ShortenedPerplexity, ShortenedTaylor
from slm_pipeline.methods.shortgpt import ShortGPT
from slm_pipeline.methods.sleb import Sleb
from slm_pipeline.methods.slm import SlidingLayerMerging
from slm_pipeline.methods.streamline import Streamline
from slm_pipeline.methods.threshold import ThresholdMerging

Decision = list[Any]

LOOPS: dict[type, Callable[[PruningProblem, Any], Decision]] = {
    SlidingLayerMerging: slm,
    Laco: laco,
    Sleb: sleb,
    ShortenedPerplexity: shortened_ppl,
    ShortenedTaylor: shortened_taylor,
    FinerCut: finercut,
    ShortGPT: shortgpt,
    AngularDistance: angular,
    Streamline: streamline,
    ReplaceMe: replaceme,
    Come: come,
    ComePosterior: come,
    Mka: mka,
}


def decision_of(method: Any, plan: Any) -> Decision:
    """What a plan decided, in the form that the published loop gives."""
    if isinstance(method, FinerCut):
        return [found["removed"] for found in plan.scores["rounds"]]
    if isinstance(method, (ThresholdMerging, Come, Mka)) and not getattr(method, "official", False):
        return [(min(op.layers), max(op.layers)) for op in plan.ops]
    return list(plan.scores["order"])


READ_STATISTICS = (ShortGPT, AngularDistance)  # Streamline and ReplaceMe are AngularDistances
