"""Of the models that evaluations load, at most the scored and the dense one are in memory."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest

from slm_pipeline.jobs.loaded import LoadedModels, ScoredModel


class Model:
    """Something that can be followed."""


@pytest.fixture
def loads():
    """The names of the models loaded so far, and for each how many others were in memory by then."""
    return []


@pytest.fixture
def scored(loads):
    """A function that gives what a measure of a model gets; all share one set of loaded models, ``scored.loaded``."""
    alive: dict[int, weakref.ref] = {}

    def load(name: str):
        gc.collect()
        loads.append((name, sum(model() is not None for model in alive.values())))
        model = Model()
        alive[len(alive)] = weakref.ref(model)
        return model, f"{name}'s tokenizer"

    def of(target: str, *, reads_dense: bool = False) -> ScoredModel:
        return ScoredModel(target, of.loaded, lambda: load(target), lambda: load("dense"), reads_dense)

    of.loaded = LoadedModels()
    return of


def test_a_model_is_loaded_when_it_is_first_asked_for_and_kept_for_the_next_measure(scored, loads):
    first = scored("pruned")
    assert loads == []
    assert first.tokenizer == "pruned's tokenizer"
    assert first.model is scored("pruned").model
    assert loads == [("pruned", 0)]


def test_another_model_is_loaded_after_the_one_before_was_let_go(scored, loads):
    for target in ("dense", "pruned", "recovered", "pruned"):
        assert scored(target).model
    assert loads == [("dense", 0), ("pruned", 0), ("recovered", 0), ("pruned", 0)]


def test_a_measure_that_compares_has_the_dense_model_beside_and_it_is_loaded_once(scored, loads):
    assert scored("dense").model
    for target in ("pruned", "recovered"):
        pair = scored(target, reads_dense=True)
        assert pair.model is not pair.dense
        assert pair.dense is pair.dense
    assert loads == [("dense", 0), ("pruned", 1), ("recovered", 1)]  # never three


def test_whichever_is_asked_for_first_both_stay(scored, loads):
    pair = scored("pruned", reads_dense=True)
    dense, model = pair.dense, pair.model
    assert (pair.dense, pair.model) == (dense, model)
    assert loads == [("dense", 0), ("pruned", 1)]


def test_the_dense_model_goes_when_the_next_measure_does_not_compare(scored, loads):
    pair = scored("pruned", reads_dense=True)
    dense = weakref.ref(pair.dense)
    assert pair.model is scored("pruned").model
    gc.collect()
    assert dense() is None
    assert loads == [("dense", 0), ("pruned", 1)]


def test_released_nothing_is_left(scored, loads):
    pair = scored("pruned", reads_dense=True)
    models = [weakref.ref(pair.dense), weakref.ref(pair.model)]
    scored.loaded.release()
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert pair.model
    assert loads[-1] == ("pruned", 0)


def test_what_is_sent_to_another_process_is_that_ones_own(scored):
    assert scored("pruned").tokenizer == "pruned's tokenizer"
    sent, again = (pickle.loads(pickle.dumps(scored.loaded)) for _ in range(2))
    assert sent is again
    assert sent is not scored.loaded
    assert sent._kept == {}
