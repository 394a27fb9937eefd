"""Pictures of a run, from plain numbers: each as PNG to look at and as SVG for a paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_pipeline.show.canvas import WIDTH, log_scale, spans_decades
from slm_pipeline.show.canvas import new_figure as _figure
from slm_pipeline.show.canvas import save as _save
from slm_pipeline.show.marks import Mark
from slm_pipeline.show.marks import looks as mark_looks

# Okabe and Ito's colours, which colour-blind readers can tell apart; one meaning each, in every picture.
COLORS = {
    "accepted": "#0072B2",  # blue
    "rejected": "#D55E00",  # vermilion
    "merged": "#0072B2",  # accepted, in the end
    "kept": "#D9D9D9",
    "dropped": "#B0B0B0",
    "training": "#56B4E9",  # sky blue
    "validation": "#E69F00",  # orange
    "reference": "#000000",
    "static": "#009E73",  # bluish green
    "oracle": "#CC79A7",  # reddish purple
    "plan": "#F0E442",  # yellow
}


def search_steps(
    steps: Sequence[Mapping[str, Any]], threshold: float | None, path_stem: Path, *, title: str
) -> list[Path]:
    """What a sliding search tried, in order: each window's similarity, and below it the layers of the window.

    Args:
        steps: a plan's ``scores.steps``: ``low`` and ``high`` (original layers, both inclusive), ``similarity`` and
            ``accepted``.
        threshold: drawn as a line; None for none.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.

    Returns:
        The files written.
    """
    from matplotlib.ticker import MaxNLocator

    committed = committed_windows(steps)
    with _figure(WIDTH, 3.9) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for accepted, name, marker in ((True, "accepted", "o"), (False, "rejected", "x")):
            chosen = [i for i, step in enumerate(steps) if step["accepted"] == accepted]
            similarities = [steps[i]["similarity"] for i in chosen]
            numbers = [i + 1 for i in chosen]
            above.scatter(numbers, similarities, s=18, marker=marker, color=COLORS[name], label=name, zorder=3)
            bottoms = [steps[i]["low"] - 0.5 for i in chosen]
            heights = [steps[i]["high"] - steps[i]["low"] + 1 for i in chosen]
            alphas = [1.0 if i in committed else 0.35 for i in chosen]
            for number, bottom, height, alpha in zip(numbers, bottoms, heights, alphas, strict=True):
                below.bar(number, height, 0.7, bottom, color=COLORS[name], alpha=alpha, lw=0)
        for i in committed:
            low, high, similarity = (steps[i][key] for key in ("low", "high", "similarity"))
            above.annotate(f"{low}-{high}", (i + 1, similarity), (0, 6), textcoords="offset points", ha="center")
        if threshold is not None:
            label = f"threshold {threshold:g}"
            above.axhline(threshold, color=COLORS["reference"], lw=0.8, ls="--", label=label, zorder=1)
        above.margins(y=0.15)
        above.set_title(title, loc="left")
        above.set(ylabel="similarity to the dense model", xlim=(0.3, len(steps) + 0.7))
        above.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.0, ncols=3)
        below.set(xlabel="search step (solid bar: merged in the end)", ylabel="layers in the window")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        below.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        return _save(figure, path_stem)


_JUDGED = {"kl": "KL from the dense model (nats)", "loss": "next-token loss (nats)"}


def search_candidates(trace: Sequence[Mapping[str, Any]], path_stem: Path, *, title: str) -> list[Path]:
    """What a search over models tried: how good each candidate is, over its size.

    Args:
        trace: a plan's ``scores.trace``: ``parameters`` of the layers, ``num_tokens`` that weights were fitted to, and
            ``kl`` or ``loss`` in nats a token, and whether it was ``accepted``: the best of those, on most text, is
            marked.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.

    Returns:
        The files written.
    """
    judged = "kl" if "kl" in trace[0] else "loss"
    tokens = sorted({row["num_tokens"] for row in trace})
    taken = [row for row in trace if row.get("accepted", True)]
    best = min(taken, key=lambda row: (-row["num_tokens"], row[judged]))
    with _figure(WIDTH, 3.4) as figure:
        axes = figure.subplots()
        for rank, number in enumerate(tokens, start=1):
            of = [row for row in trace if row["num_tokens"] == number]
            places = [row["parameters"] / 1e6 for row in of], [row[judged] for row in of]
            alpha = rank / len(tokens)
            axes.scatter(*places, s=18, color=COLORS["accepted"], alpha=alpha, label=f"{number:,} tokens", zorder=2)
        axes.scatter(
            best["parameters"] / 1e6,
            best[judged],
            s=90,
            fc="none",
            ec=COLORS["rejected"],
            lw=1.4,
            label="taken",
            zorder=3,
        )
        axes.invert_xaxis()
        if spans_decades([row[judged] for row in trace]):
            log_scale(axes, "y")
        axes.set_title(title, loc="left")
        axes.set(xlabel="million parameters in the layers", ylabel=_JUDGED[judged])
        axes.legend(loc="upper left", borderpad=0.0)
        return _save(figure, path_stem)


def committed_windows(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the steps whose window was merged: of the windows accepted with one upper end, the longest."""
    longest: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step["accepted"] and (step["high"] not in longest or step["low"] < steps[longest[step["high"]]]["low"]):
            longest[step["high"]] = i
    return sorted(longest.values())


def loss_curve(
    curve: Sequence[Mapping[str, float]], path_stem: Path, *, title: str, loss: str = "nats per answer token"
) -> list[Path]:
    """Training and validation loss of a recovery, with the best validation loss of a single training marked.

    Args:
        curve: in order of time, ``{"step", "loss", ...}`` and ``{"step", "eval_loss", ...}``; rows with ``logit_``
            before these names get a panel of their own.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.
        loss: what the numbers are.

    Returns:
        The files written.
    """
    from matplotlib.ticker import MaxNLocator

    panels = by_unit(curve, loss)
    with _figure(4.4 * len(panels), 2.8) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)
        for axes, (unit, rows) in zip(grid[0], panels.items(), strict=True):
            parts = trainings(rows)
            for number, part in enumerate(parts):
                for key, name in (("loss", "training"), ("eval_loss", "validation")):
                    if points := loss_points(part, key):
                        marker = "o" if key == "eval_loss" or len(points) == 1 else ""  # one point has no line
                        style: dict[str, Any] = {"color": COLORS[name], "lw": 1.3, "marker": marker, "ms": 4}
                        axes.plot(*zip(*points, strict=True), **style, label=None if number else name)
            validation = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
            if validation and len(parts) == 1:
                best, step = min(validation)
                axes.axhline(best, color=COLORS["reference"], lw=0.8, ls=":", label=f"best {best:.3f} at step {step:g}")
            in_turn = "" if len(parts) == 1 else ", one layer after the other"
            axes.set(xlabel=f"optimiser step{in_turn}", ylabel=f"loss ({unit})")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            if spans_decades([value for line in axes.lines for value in line.get_ydata()]):
                log_scale(axes, "y")
            axes.legend()
        figure.suptitle(title)
        return _save(figure, path_stem)


def loss_points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Step and value of ``loss`` or ``eval_loss`` in one training's rows.

    A validation loss is of the model after that step. A training loss is the mean over all steps since the last
    one that was logged: it stands in their middle, not at their end, where the two would not be of the same model.
    """
    found = [(row["step"], row[key]) for row in rows if key in row]
    if key != "loss" or not found:
        return found
    begun = 0.0 if "loss" in rows[0] else rows[0]["step"]  # a validation before the first step
    starts = [begun, *(step for step, _ in found)]
    return [((start + 1 + step) / 2, value) for start, (step, value) in zip(starts, found, strict=False)]


def by_unit(curve: Sequence[Mapping[str, Any]], loss: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a recovery's curve by what their losses are: ``loss``, or those on logits, without their prefix."""
    rows = [{name.removeprefix("logit_"): value for name, value in row.items()} for row in curve]
    on_logits = [any(name.startswith("logit_") for name in row) for row in curve]
    panels = {
        loss: [row for row, logits in zip(rows, on_logits, strict=True) if not logits],
        "nats, whole model": [row for row, logits in zip(rows, on_logits, strict=True) if logits],
    }
    return {unit: rows for unit, rows in panels.items() if rows}


def trainings(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows of one training after the other: a step validated twice ends one layer's and begins the next one's."""
    found: list[list[Mapping[str, Any]]] = [[]]
    validated = None
    for row in rows:
        if "eval_loss" in row:
            if row["step"] == validated:
                found.append([])
            validated = row["step"]
        found[-1].append(row)
    return found


def dynamic_skip(found: Mapping[str, Any], path_stem: Path, *, title: str) -> list[Path]:
    """Loss against layers kept, of one choice for everybody, of an oracle and of plans; how many layers sequences need.

    Args:
        found: what `slm_pipeline.analysis.dynamic_skip.summarize` returns.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.

    Returns:
        The files written.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    oracle, depth = found["oracle"], found["num_layers"]
    numbers = list(range(1, depth + 1))
    with _figure(WIDTH, 4.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for name, curve, label in (
            ("static", found["static"], "evenly spaced, the same for all"),
            ("oracle", found["at_most"], "best of at most k for each sequence"),
        ):
            losses = [math.nan if point["loss"] is None else point["loss"] for point in curve]
            above.plot(numbers, losses, color=COLORS[name], lw=1.3, marker="o", ms=3, label=label)
        label = f"as good as all {depth} for each sequence: {oracle['mean_num_layers']:.1f} on average"
        star: dict[str, Any] = {"marker": "*", "s": 110, "color": COLORS["oracle"], "ec": "black", "lw": 0.5}
        above.scatter([oracle["mean_num_layers"]], [oracle["loss"]], zorder=4, label=label, **star)
        plans = [plan for plan in found["plans"] if plan["loss"] is not None]
        for plan, marker in zip(plans, itertools.cycle("Ds^vPXh"), strict=False):
            looks: dict[str, Any] = {"marker": marker, "s": 28, "color": COLORS["plan"], "ec": "black", "lw": 0.5}
            label = f"plan: {plan['method']}, {plan['num_layers']} layers"
            above.scatter([plan["num_layers"]], [plan["loss"]], zorder=3, label=label, **looks)
        dense = found["static"][-1]["loss"]
        above.axhline(dense, color=COLORS["reference"], lw=0.8, ls=":", label=f"all {depth} layers", zorder=1)
        above.set_title(title, loc="left")
        above.set(ylabel="loss (nats per token)", xlim=(0.3, depth + 0.7))
        if above.dataLim.y1 > 3 * above.dataLim.y0:  # with few layers losses are huge, and mean nothing
            above.set_yscale("log")
            above.yaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 5, 7]))
            above.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            above.yaxis.set_minor_locator(NullLocator())
        above.legend()
        below.bar(numbers, oracle["counts"], 0.7, color=COLORS["oracle"], lw=0)
        within = f", within {100 * found['tolerance']:g}%" if found["tolerance"] else ""
        below.set(xlabel="layers kept (k)", ylabel="sequences")
        below.set_title(f"sequences that need so many to be as good as the whole model{within}", loc="left")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        below.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=4))
        return _save(figure, path_stem)


def painters(found: Mapping[str, Any], path_stem: Path, *, title: str) -> list[Path]:
    """Loss against the number of middle layers that are run otherwise, one curve for each way.

    Args:
        found: what `slm_pipeline.analysis.painters.measure` returns.
        path_stem: where to write, without ``.png`` and ``.svg``.
        title: the picture's title.

    Returns:
        The files written.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    dense = found["dense"]["loss"]
    numbers = [last - first + 1 for first, last in found["ranges"]]
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    with _figure(WIDTH, 3.4) as figure:
        axes = figure.add_subplot()
        looks = zip(found["variants"].items(), itertools.cycle(colors), itertools.cycle("osD^vPX"), strict=False)
        for (name, points), color, marker in looks:
            losses = [dense, *(math.nan if point["loss"] is None else point["loss"] for point in points)]
            axes.plot([0, *numbers], losses, color=color, lw=1.3, marker=marker, ms=3.5, label=name)
        axes.axhline(dense, color=COLORS["reference"], lw=0.8, ls=":", label="whole model", zorder=1)
        axes.set_title(title, loc="left")
        axes.set(ylabel="loss (nats per token)", xlabel="layers in the middle that are run otherwise")
        if axes.dataLim.y1 > 3 * axes.dataLim.y0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 5, 7]))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside right upper")
        return _save(figure, path_stem)


def layer_strip(
    layer_groups: Sequence[Sequence[int]],
    dropped: Sequence[int],
    num_layers: int,
    path_stem: Path,
    *,
    marks: Sequence[Mark] = (),
) -> list[Path]:
    """The dense model's layers as a strip of cells, and below it the layers of the pruned model that they became.

    Args:
        layer_groups: for each pruned layer the original layers merged into it.
        dropped: original layers in no group.
        num_layers: of the dense model.
        path_stem: where to write, without ``.png`` and ``.svg``.
        marks: on the cells of layers, above and below.

    Returns:
        The files written.
    """
    from matplotlib.patches import Patch, Rectangle

    looks: dict[str, dict[str, Any]] = {
        "kept": {"fc": COLORS["kept"], "ec": "white", "lw": 0.8},
        "merged": {"fc": COLORS["merged"], "ec": "white", "lw": 0.8},
        "dropped": {"fc": "white", "ec": COLORS["dropped"], "hatch": "/////", "lw": 0.5},
        **mark_looks(marks, COLORS["kept"], 0.5),
    }
    with _figure(WIDTH, 1.35) as figure:
        axes = figure.add_subplot()
        # In points, so that two digits fit a cell: upright where there is room, else on their side.
        size, rotation = (7.0, 0) if num_layers <= 36 else (min(7.0, 420 / num_layers), 90)

        def cell(left: float, bottom: float, number: int, kind: str) -> None:
            axes.add_patch(Rectangle((left, bottom), 1, 1, **looks[kind]))
            ink = "white" if kind == "merged" else "black"
            place: dict[str, Any] = {"ha": "center", "va": "center", "rotation": rotation}
            axes.text(left + 0.5, bottom + 0.5, str(number), size=size, color=ink, **place)

        for layer in dropped:
            cell(layer, 1.0, layer, "dropped")
        below = {}
        for index, group in enumerate(layer_groups):
            kind = "merged" if len(group) > 1 else "kept"
            middle = (group[0] + group[-1] + 1) / 2
            for layer in group:
                cell(layer, 1.0, layer, kind)
                axes.plot([layer + 0.5, middle], [0.95, 0.55], color=COLORS[kind], lw=1.0)
            cell(middle - 0.5, -0.5, index, kind)
            below[group[0]] = middle - 0.5
        for mark in marks:
            for layer in mark.layers:
                for left, row in ((layer, 1.0), (below.get(layer, layer), -0.5)):
                    axes.add_patch(Rectangle((left, row + mark.bottom), 1, mark.height, **looks[mark.label]))
        kinds = [
            "kept",
            *(["merged"] if any(len(group) > 1 for group in layer_groups) else []),
            *(["dropped"] if dropped else []),
        ]
        kinds += dict.fromkeys(mark.label for mark in marks)
        labels = {"merged": "merged into one"}
        entries = [Patch(**looks[kind], label=labels.get(kind, kind)) for kind in kinds]
        figure.legend(handles=entries, loc="outside lower center", ncols=len(entries))
        axes.set(xlim=(-0.2, num_layers + 0.2), ylim=(-0.6, 2.1))
        axes.set_yticks([1.5, 0.0], [f"dense: {num_layers} layers", f"pruned: {len(layer_groups)} layers"])
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        return _save(figure, path_stem)
