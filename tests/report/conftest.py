"""A run, and sweeps of a few jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import dense_only, finished, write_run

from slm_pipeline.report import per_run
from slm_pipeline.show import curves


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    return dense_only(tmp_path)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Jobs 0, 1, 2 and 10: finished twice, failed, interrupted."""
    directory = tmp_path / "ratio"
    results = {
        10: None,
        2: finished(tmp_path, 24, 20.25, 40.0, 50.0),
        1: "ratio=2 must be\nbelow 1",
        0: finished(tmp_path, 27, 30.5, 50.0, 60.0),
    }
    for job, result in results.items():
        write_run(directory / str(job), ["model=tiny", f"pruning_ratio=r{job}"], result)
        (directory / str(job) / "store" / ".hydra").mkdir(parents=True)  # no run of its own
    return directory


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Two methods with three seeds each; one job failed. slm's perplexities are 20 and 26, laco's 30, 31 and 35."""
    directory = tmp_path / "seeds"
    results = [("slm", 20.0), ("slm", 26.0), ("slm", None), ("laco", 30.0), ("laco", 31.0), ("laco", 35.0)]
    study = {
        "question": "How sure is it?",
        "metric": "pruned/perplexity/bundled",
        "x": "num_layers",
        "series": ["method"],
    }
    for job, (method, value) in enumerate(results):
        layers = 24 if method == "slm" else 20
        result = "loss is nan" if value is None else finished(tmp_path, layers, value, method=method)
        overrides = [f"method={method}", f"seed={job % 3}", "sweeps=seeds"]
        config = {"name": "seeds", "seed": job % 3, "study": {**study, "sort_by": None}}
        write_run(directory / str(job), overrides, result, config=config, choices={"method": method})
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """Calls of the drawing functions, by the name of the picture, instead of pictures."""
    calls: dict[str, dict[str, Any]] = {}

    def record(*arguments: Any, **options: Any) -> list[Path]:
        *given, path_stem = arguments
        calls[path_stem.name] = {"arguments": given, **options}
        return [path_stem]

    for name in ("against", "ranked", "front", "search_traces", "training_curves"):
        monkeypatch.setattr(curves, name, record)
    monkeypatch.setattr(per_run, "layer_strips", record)
    return calls
