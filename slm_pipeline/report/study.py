"""Many runs as one study: what they share, where they differ, and their numbers side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slm_pipeline.config import TARGETS
from slm_pipeline.errors import UserError, did_you_mean
from slm_pipeline.report import damage
from slm_pipeline.report.runs import STATUSES, Run, Value, read_runs, text_of
from slm_pipeline.report.winners import Winner, scope, winners_of
from slm_pipeline.results.before import key_of
from slm_pipeline.results.certainty import chance
from slm_pipeline.results.devices import devices_of
from slm_pipeline.results.measurement import measurement, small_limit
from slm_pipeline.results.number import Number, parted
from slm_pipeline.results.of_run import numbers_of, ratio_missed
from slm_pipeline.results.settings import told_apart
from slm_pipeline.show.tables import Table, in_order
from slm_pipeline.store.checksums import digest

# Options that change no number: where things go, and what a study says of itself.
_ASIDE = ("hydra", "study", "sweeps", "output_dir", "data_dir", "tracker", "dry_run", "keep", "local")


@dataclass(frozen=True)
class Study:
    """Runs in the order of their table, and what the table and the plots are to show. See `read_study`."""

    name: str
    question: str | None
    runs: Sequence[Run]
    options: Sequence[str]  # in which the runs differ
    metric: str | None  # a column
    x: str | None  # a column or an option
    series: Sequence[str]  # options
    sort_by: str | None  # a column or an option
    chosen: Sequence[str] | None  # the columns to show; None for the usual ones
    notes: Sequence[str]  # what of the study's wishes could not be met

    @cached_property
    def numbers(self) -> list[dict[str, Number]]:
        """For each run its numbers by key, which are the table's columns; empty unless it is done.

        A key says how a number was measured where not all runs have measured it alike: see `told_apart`.
        """
        return _numbers(self.runs)[0]

    @cached_property
    def models(self) -> list[str]:
        """For each run its dense model: the name, and which where several have it, as folders that changed do.

        Runs of a version that did not say which are of the one that others name, if they all name one.
        """
        said = [run.summary or {} for run in self.runs]
        names = [str(summary.get("model", "")) for summary in said]
        prints = [str(summary.get("fingerprint", "")) for summary in said]
        several = {
            name for name in names if len({p for n, p in zip(names, prints, strict=True) if n == name and p}) > 1
        }
        return [
            f"{name} {digest(which)[:6] if which else '(unknown)'}" if name in several else name
            for name, which in zip(names, prints, strict=True)
        ]

    @cached_property
    def kinds(self) -> dict[str, Number]:
        """Every column with a number of its kind: its unit, its direction."""
        found: dict[str, Number] = {}
        for numbers in sorted(self.numbers, key=len, reverse=True):
            found = {**numbers, **found}
        names = in_order(name for numbers in sorted(self.numbers, key=len, reverse=True) for name in numbers)
        return {name: found[name] for name in names}

    @property
    def columns(self) -> list[str]:
        """Every number that some run has."""
        return list(self.kinds)

    @cached_property
    def devices(self) -> dict[str, list[str]]:
        """Columns whose numbers were measured on several devices, and those: they are shown and not compared."""
        return _devices(self.kinds, self.numbers)

    def is_higher_better(self, column: str | None) -> bool:
        return column in self.kinds and bool(self.kinds[column].higher_is_better)

    def value(self, run: int, column: str | None) -> float | None:
        """A run's number; None if it has none of that name."""
        number = self.numbers[run].get(column or "")
        return None if number is None else number.value

    def outcome(self, run: int) -> Number | None:
        """A run's metric, else the number of that kind of its last model: recovered, repaired or pruned."""
        found = self.numbers[run]
        if self.metric is None or self.metric in found:
            return found.get(self.metric or "")
        target, quantity = parted(plain(self.metric))
        names = [f"{other}/{quantity}" for other in reversed(TARGETS) if target and other != "dense"]
        return next((number for name in names for key, number in found.items() if plain(key) == name), None)

    def other(self, outcome: Number) -> str:
        """Of which model an `outcome` is, and how it was measured, where the metric's name does not say; else empty."""
        return (
            "" if outcome.key == self.metric else f"{outcome.target} {outcome.key[len(plain(outcome.key)) :]}".rstrip()
        )

    @cached_property
    def dense(self) -> dict[str, Number]:
        """The dense model's numbers that all finished runs share: said once, above the table."""
        finished = [numbers for numbers in self.numbers if numbers]
        shared = {}
        for name in (name for name, number in self.kinds.items() if number.target == "dense"):
            values = {numbers[name].value if name in numbers else None for numbers in finished}
            if len(values) == 1:
                shared[name] = finished[0][name]
        return shared

    @property
    def repeated(self) -> list[str]:
        """The seeds among the options, unless they are drawn: runs that differ in these alone are averaged."""
        return [name for name in self.options if name.split(".")[-1] == "seed" and name not in (self.x, *self.series)]

    @property
    def varied(self) -> list[str]:
        """The options that are no repetition."""
        return [name for name in self.options if name not in self.repeated]

    def groups(self, options: Sequence[str]) -> dict[tuple[Value | None, ...], list[int]]:
        """Values of ``options`` -> the runs that have them, as indices."""
        found: dict[tuple[Value | None, ...], list[int]] = {}
        for i, run in enumerate(self.runs):
            found.setdefault(tuple(run.option(name) for name in options), []).append(i)
        return found

    @cached_property
    def newest(self) -> list[bool]:
        """For each run whether it is the newest of those with the same options, done ones before all others.

        Only these are averaged and drawn: a job that was repeated is no second sample.
        """
        groups = self.groups(self.options).values()
        kept = {max(reversed(group), key=lambda i: self.runs[i].finished_at) for group in groups}
        return [i in kept for i in range(len(self.runs))]

    @cached_property
    def within_budget(self) -> list[bool]:
        """For each run whether it has no more layers than a search's ``objective.max_layers`` allows."""
        budgets = [run.option("objective.max_layers") for run in self.runs]
        return [
            not isinstance(budget, (int, float)) or (self.value(i, "num_layers") or 0) <= budget
            for i, budget in enumerate(budgets)
        ]

    @cached_property
    def winners(self) -> list[Winner]:
        """The best choice at each size, the largest first; none without a metric."""
        return winners_of(self)

    @cached_property
    def best_runs(self) -> frozenset[int]:
        """The runs of the best choices, and of those tied with them, at each size where no smaller one is as good."""
        return frozenset(run for winner in self.winners if winner.on_front for run in winner.runs)

    def counts(self) -> str:
        """``ratio: 4 jobs, 2 done, 1 FAILED``."""
        counts = {status: sum(run.status == status for run in self.runs) for status in STATUSES}
        jobs = f"{len(self.runs)} jobs" if len(self.runs) > 1 else "1 job"
        return f"{self.name}: {jobs}, " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)

    def shared(self) -> list[str]:
        """The overrides that all runs have, but for those that say where things go; the study's own name stays."""
        aside = set(_ASIDE) - {"sweeps"}
        first = [item for item in self.runs[0].overrides if _group(item) not in aside]
        return [item for item in first if all(item in run.overrides for run in self.runs)]

    def remarks(self) -> list[str]:
        """What is to be known before reading the table, besides what all runs share: the order, the metric."""
        lines = []
        if dense := [number for number in self.dense.values() if not number.detail]:
            lines.append("Dense model: " + ", ".join(f"{n.quantity} {n.shown(n.value)}" for n in dense))
        if self.metric is not None and len(self.runs) > 1:
            direction = self.kinds[self.metric].direction or "lower"
            levels = [level for found in self.numbers if (level := chance(found.get(self.metric))) is not None]
            guessing = f", guessing scores {self.kinds[self.metric].shown(levels[0])}" if levels else ""
            lines.append(f"Metric: {self.metric}, {direction} is better{guessing}")
            tied = ", and what noise does not tell from it" if any(winner.tied for winner in self.winners) else ""
            behind = "" if all(winner.on_front for winner in self.winners) else ", unless a smaller one is as good"
            lines.append(f"Bold: the best{scope(self)}{tied}{behind}")
        missed: dict[str, list[str]] = {}
        for run in self.runs:
            if line := ratio_missed(run.summary or {}):
                missed.setdefault(line, []).append(run.job)
        lines += [f"{_jobs(jobs)}: {line}" for line, jobs in missed.items()]
        if not all(self.within_budget):
            done = [within for within, found in zip(self.within_budget, self.numbers, strict=True) if found]
            best = ", and one of them is the best" if any(done) else ""
            lines.append(f"Budget of layers: {sum(done)} of {len(done)} runs keep to it{best}")
        if self.devices:
            parts = in_order(parted(name)[1].partition("/")[0] for name in self.devices)
            names = in_order(name for found in self.devices.values() for name in found)
            lines.append(f"{', '.join(parts)}: measured on {' and on '.join(names)}, so not to be compared across them")
        if self.sort_by is not None:
            lines.append(f"Sorted by {self.sort_by}" + (", best first" if self.sort_by in self.columns else ""))
        return [*lines, *self.notes]

    def unfinished(self) -> list[str]:
        """How the jobs are that are not done, and why; a line for all of which that is the same."""
        said: dict[str, list[str]] = {}
        for run in self.runs:
            if run.status != "done":
                said.setdefault(run.state, []).append(run.job)
        return [f"{_jobs(jobs)}: {state}" for state, jobs in said.items()]

    def measured(self, *, costs: bool = True) -> list[str]:
        """How the numbers were measured, and what they cost; a line says of which runs unless of all that are done."""
        said: dict[str, list[str]] = {}
        finished = [run for run in self.runs if run.summary]
        for run in finished:
            for line in measurement(run.summary or {}, costs=costs):
                said.setdefault(line, []).append(run.job)
        lines = [line if len(jobs) == len(finished) else f"{_jobs(jobs)}: {line}" for line, jobs in said.items()]
        return [*lines, *small_limit(run.summary for run in finished if run.summary)]

    def shown_columns(self, *, details: bool = False, costs: bool = True) -> list[str]:
        """The numbers that a table shows: the chosen ones, else all but what stands above it, details or costs that
        nobody asked for."""
        if self.chosen is not None:
            return [name for name in self.chosen if name in self.columns]
        wanted = (self.metric, self.x, self.sort_by)
        return [
            name
            for name, number in self.kinds.items()
            if name not in self.dense
            and (name in wanted or ((details or not number.detail) and (costs or not number.cost)))
        ]

    def table(self, columns: Sequence[str], *, job: bool = True, status: bool = True, reasons: bool = True) -> Table:
        """A row for each run: its folder, the options in which runs differ, the numbers, its state and why.

        A metric of another model than the column's, which is the run's last one, is followed by that model's name.
        """
        head = [*(["job"] if job else []), *self.options]
        rows = []
        for i, (run, found) in enumerate(zip(self.runs, self.numbers, strict=True)):
            shown = {name: str(number) for name, number in found.items()}
            if (last := self.outcome(i)) is not None and self.metric is not None:
                shown[self.metric] = f"{last} {self.other(last)}".rstrip()
            row = [*([run.job] if job else []), *(text_of(run.option(name)) for name in self.options)]
            row += [shown.get(name, "") for name in columns]
            rows.append([*row, *([run.state if reasons else run.status] if status else [])])
        bold = self._bold(columns, len(head), self.best_runs, len(rows))
        return Table([*head, *columns, *(["status"] if status else [])], rows, bold)

    def averages(self, columns: Sequence[str]) -> Table:
        """Mean and standard deviation over the runs that differ in seeds alone; empty unless there are such."""
        groups = {
            values: [i for i in members if self.newest[i]] for values, members in self.groups(self.varied).items()
        }

        if all(len(members) < 2 for members in groups.values()):
            return Table([], [])

        def mean(numbers: Iterable[float | None]) -> float | None:
            known = [number for number in numbers if number is not None]
            return statistics.fmean(known) if known else None

        def rank(values: tuple[Value | None, ...]) -> tuple[bool, float]:
            value = mean(self.value(i, self.sort_by) for i in groups[values])
            return value is None, (value or 0.0) * (-1 if self.is_higher_better(self.sort_by) else 1)

        order = sorted(groups, key=rank)
        rows = []
        for values in order:
            members = groups[values]
            row = [*map(text_of, values), f"{sum(bool(self.numbers[i]) for i in members)} of {len(members)}"]
            for name in columns:
                numbers = [self.numbers[i][name] for i in members if name in self.numbers[i]]
                row.append(_shown_mean(numbers) if numbers and len(devices_of(numbers)) < 2 else "")
            rows.append(row)
        head = [*self.varied, "runs done"]
        best = frozenset(i for i, values in enumerate(order) if self.best_runs.intersection(groups[values]))
        return Table([*head, *columns], rows, self._bold(columns, len(head), best, len(rows)))

    def averages_title(self) -> str:
        """What `averages` shows, in words."""
        left_out = self.newest.count(False)
        title = f"Averaged over {' and '.join(self.repeated)}: mean +- standard deviation of the runs that are done"
        return f"{title}; {left_out} other runs of the same jobs left out" if left_out else title

    def _bold(
        self, columns: Sequence[str], offset: int, best: frozenset[int], num_rows: int
    ) -> frozenset[tuple[int, int]]:
        """The cells of the best rows' metric, as row and column; none where there is nothing to compare."""
        if self.metric is None or self.metric not in columns or num_rows < 2:
            return frozenset()
        column = offset + list(columns).index(self.metric)
        return frozenset((row, column) for row in best)


def read_study(
    *directories: Path,
    metric: str | None = None,
    x: str | None = None,
    series: Sequence[str] | None = None,
    sort_by: str | None = None,
    columns: Sequence[str] | None = None,
) -> Study:
    """The runs below the folders as one study.

    What is not given is what the runs' configuration says under ``study``, as far as they agree; else the metric is
    the last model's perplexity or average, drawn against layers, with a curve for each model, method,
    repair and recovery.

    Args:
        directories: sweep folders, folders of runs, or trees of them.
        metric: the column that answers the study's question.
        x: a column or an option, what the metric is drawn against.
        series: options whose values name the curves.
        sort_by: a column or an option. The best run first, by an option in its order; runs without a value last.
        columns: the numbers to show; None for all that a table has room for.

    Raises:
        UserError: no such folder, no runs in it, no such column or option, or a column to go by that was measured on
            several devices. One that the configuration names is a
            note instead, and while no run is done every column may still come.
    """
    runs = read_runs(*directories)
    options = _differing(runs)
    declared = _declared(runs)
    numbers, before = _numbers(runs)
    kinds = {name: number for of_run in numbers for name, number in of_run.items()}
    found = list(kinds)
    devices = _devices(kinds, [numbers_of(run.summary) for run in runs if run.summary])
    notes: list[str] = []

    def of_most(name: str) -> str:
        """Of a key that was measured in several ways, the one of most runs."""
        ways = [way for way, key in before.items() if key == before.get(name, name)]
        if not ways:
            return name
        chosen = max(ways, key=lambda way: sum(way in of_run for of_run in numbers))
        notes.append(f"{before[chosen]} was measured in {len(ways)} ways, which do not compare: {', '.join(ways)}")
        return chosen

    def column(key: str, given: str | None, or_option: bool = False) -> str | None:
        wanted = given or declared.get(key)
        wanted = wanted if wanted is None or wanted in found else key_of(wanted)
        if given is None and wanted is not None and wanted not in found:
            wanted = _on_another_text(wanted, found) or wanted
        wanted = of_most(str(wanted)) if wanted in before.values() else wanted
        if wanted is None or not found and not given:
            return None
        if wanted in devices and key != "columns":
            message = f"{key}={wanted!r} was measured on {' and on '.join(devices[wanted])}: they cannot be compared"
            if given:
                raise UserError(message)
            notes.append(message)
            return None
        if wanted in found or (or_option and any(run.option(wanted) is not None for run in runs)):
            return str(wanted)
        near = did_you_mean(wanted, [*found, *options])  # without one there are too many to guess from
        message = f"{key}={wanted!r} is not a column of this table"
        message += near or f"; columns: {', '.join([*found, *options])}"
        if given and found:
            raise UserError(message)
        notes.append(message if given is None else f"{key}={wanted!r}: no run is done yet")
        return None

    if columns is not None:
        columns = [column("columns", name) or name for name in columns]
    given_series = series is not None
    if series is None:
        usual = [name for name in ("model", "method", "repair", "recovery") if name in options and name != x]
        series = list(declared.get("series") or ([] if declared.get("metric") else usual))
    if unknown := [name for name in series if all(run.option(name) is None for run in runs)]:
        near = did_you_mean(unknown[0], options)
        message = f"series={unknown[0]!r} is not an option of these runs{near}; they differ in: {', '.join(options)}"
        if given_series:
            raise UserError(message)
        notes.append(message)
        series = [name for name in series if name not in unknown]
    chosen_sort = column("sort_by", sort_by, or_option=True)
    chosen_metric = column("metric", metric)
    if chosen_metric is None and (default := usual_metric(found)) is not None:
        chosen_metric = of_most(default)
    names = in_order(str(run.config["name"]) for run in runs if run.config.get("name"))
    return Study(
        name=", ".join(names) or ", ".join(directory.resolve().name for directory in directories),
        question=declared.get("question"),
        runs=_sorted(runs, chosen_sort, numbers),
        options=options,
        metric=chosen_metric,
        x=column("x", x, or_option=True) or usual_size(runs),
        series=series,
        sort_by=chosen_sort,
        chosen=columns,
        notes=in_order(notes),
    )


def _on_another_text(column: str, columns: Iterable[str]) -> str | None:
    """The one column that differs from this one in the text alone: studies name the default text, and another may have
    been measured in its place. Other measures name settings there, which are no substitute."""

    def apart_from_text(name: str) -> list[str]:
        target, measure, _, *rest = [*name.split("/"), "", "", ""]
        return [target, measure, *rest] if measure in ("perplexity", "fidelity") else []

    same = [name for name in columns if apart_from_text(name) == apart_from_text(column) != []]
    return same[0] if len(same) == 1 else None


def _devices(columns: Iterable[str], runs: Sequence[Mapping[str, Number]]) -> dict[str, list[str]]:
    """Those of the columns whose numbers hold for several devices, and these."""
    found = {name: devices_of(numbers[name] for numbers in runs if name in numbers) for name in columns}
    return {name: devices for name, devices in found.items() if len(devices) > 1}


def _declared(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs' configurations say under ``study``: each key on which all that have one agree."""
    said = [run.config["study"] for run in runs if isinstance(run.config.get("study"), Mapping)]
    found = {key: said[0][key] for key in ("question", "metric", "x", "sort_by") if said and said[0].get(key)}
    found = {key: value for key, value in found.items() if isinstance(value, str)}
    if said and (series := said[0].get("series")) and damage.fault(series, [damage.text]) is None:
        found["series"] = series
    return {key: value for key, value in found.items() if all(one.get(key) == value for one in said)}


def _differing(runs: Sequence[Run]) -> list[str]:
    """The options that differ between runs, those of the command lines first.

    Runs whose command lines name the same options differ in these alone; else also in the options of groups that a
    study's file may have chosen. Where a command line is silent, the configuration says what held.
    """
    named = [set(run.overridden) for run in runs]
    names = in_order(name for run in runs for name in run.overridden)
    if any(one != named[0] for one in named):
        names = in_order(["name", *names, *(group for run in runs for group in run.choices)])
    names = [name for name in names if _group(name) not in _ASIDE]
    values = {name: {run.option(name) for run in runs} - {None} for name in names}
    return [name for name in names if len(values[name]) > 1]


def _group(override: str) -> str:
    """``+hydra.sweep.dir=x`` -> ``hydra``"""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _numbers(runs: Sequence[Run]) -> tuple[list[dict[str, Number]], dict[str, str]]:
    return told_apart([numbers_of(run.summary) if run.summary else {} for run in runs])


def _sorted(runs: list[Run], sort_by: str | None, numbers: Sequence[Mapping[str, Number]]) -> list[Run]:
    if sort_by is None:
        return runs
    known = [of_run[sort_by] for of_run in numbers if sort_by in of_run]
    sign = -1 if known and known[0].higher_is_better else 1

    def key(i: int) -> tuple[Any, ...]:
        if known:
            number = numbers[i].get(sort_by)
            return (number is None, 0 if number is None else sign * number.value)
        option = runs[i].option(sort_by)
        return (option is None, isinstance(option, str), option or 0)

    return [runs[i] for i in sorted(range(len(runs)), key=key)]


def plain(key: str) -> str:
    """A key without the settings that tell it from others of its name."""
    return key.partition("[")[0]


def usual_metric(columns: Sequence[str], *, score: bool = False) -> str | None:
    """The last model's perplexity, else its average, else none; ``score``: its average first."""
    quantities = ("average", "perplexity/") if score else ("perplexity/", "average")
    for start in quantities:
        found = [name for name in columns if parted(name)[0] and parted(name)[1].startswith(start)]
        if found:
            last = max(TARGETS.index(parted(name)[0]) for name in found)
            return [name for name in found if parted(name)[0] == TARGETS[last]][-1]
    return None


def usual_size(runs: Sequence[Run]) -> str | None:
    """What size is counted in: layers, but parameters where a run lost some and kept every layer; None of no run."""
    found = [run.summary for run in runs if run.summary and "num_layers" in run.summary]
    for layers, parameters in ((one["num_layers"], one.get("parameters")) for one in found):
        if parameters and layers["pruned"] == layers["dense"] and parameters["pruned"] < parameters["dense"]:
            return "parameters"
    return "num_layers" if found else None


def mean_and_deviation(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter None of a single number."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def _shown_mean(numbers: Sequence[Number]) -> str:
    mean, deviation = mean_and_deviation([number.value for number in numbers])
    shown = None if numbers[0].is_count and not deviation else deviation
    return str(replace(numbers[0], value=mean, stderr=shown, measured={}))  # no interval of one sample


def _jobs(jobs: Sequence[str]) -> str:
    shown_jobs = ", ".join(jobs) if len(jobs) <= 8 else f"{', '.join(jobs[:6])} and {len(jobs) - 6} more"
    return f"job {shown_jobs}" if len(jobs) == 1 else f"jobs {shown_jobs}"
