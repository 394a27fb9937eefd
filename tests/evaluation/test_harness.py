"""How processes share the requests of lm-eval's tasks. With lm-eval and a model: tests/jobs/test_launched.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from two_processes import of_both

from slm_pipeline.evaluation.harness import shared
from slm_pipeline.machine import ranks

# Of two tasks, each with documents of its own from 0 on, with one to three requests.
REQUESTS = [
    SimpleNamespace(task_name=task, doc_id=document, args=f"{task} {document} {option}")
    for task, document, options in (("a", 0, 3), ("a", 1, 1), ("a", 2, 2), ("b", 0, 2), ("b", 1, 1))
    for option in range(options)
]


@pytest.mark.parametrize("number", [9, 4, 3, 0])
def test_answers_are_in_the_requests_order_and_a_document_is_one_processs(number, monkeypatch):
    asked: dict[int, list[str]] = {0: [], 1: []}

    def answer(requests, disable_tqdm):
        assert disable_tqdm
        asked[ranks.rank()] += [request.args for request in requests]
        return [request.args.upper() for request in requests]

    requests = REQUESTS[:number]
    found = of_both(monkeypatch, lambda: shared(answer, requests, disable_tqdm=True))
    assert found == [[request.args.upper() for request in requests]] * 2
    first = {"a 0 0", "a 0 1", "a 0 2", "a 2 0", "a 2 1", "b 1 0"}  # every other document
    assert asked[0] == [request.args for request in requests if request.args in first]
    assert asked[1] == [request.args for request in requests if request.args not in first]
