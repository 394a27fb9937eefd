"""Whether the hub answers, with a hub of one's own."""

from __future__ import annotations

import socket

import pytest

from slm_pipeline.machine.network import hub, hub_answers


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def test_it_answers_where_somebody_listens_and_is_asked_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers()
    assert hub_answers()  # as it was when it was asked
    hub_answers.cache_clear()
    assert not hub_answers()


def test_a_proxy_is_the_one_to_say(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub_answers()


def test_the_usual_address(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub() == "https://huggingface.co"
