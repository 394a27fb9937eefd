"""What every repair does with its own text."""

from __future__ import annotations

import logging

import pytest
from repairs import refit

from slm_pipeline.config import CalibrationConfig
from slm_pipeline.data import calibration
from slm_pipeline.errors import UserError
from slm_pipeline.models.loading import byte_tokenizer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "nowhere.txt"}, "^repair.calibration.path='nowhere.txt' does not exist in data_dir="),
        ({"path": None}, "^repair.calibration.source=text_file needs repair.calibration.path=FILE$"),
        ({"source": "books"}, "^repair.calibration.source='books' is not one of"),
        ({"sampling": "odd"}, "^repair.calibration.sampling='odd' is not one of"),
        (
            {"num_samples": 9},
            "^repair.calibration.path='calibration.txt' has 40 bytes;"
            " repair.calibration.num_samples=9 x repair.calibration.seq_len=5 needs 45 tokens$",
        ),
    ],
)
def test_what_is_wrong_with_its_text_is_said_of_its_own_options(given, message, tmp_path):
    (tmp_path / "calibration.txt").write_text("x" * 40)
    values = {"source": "text_file", "path": "calibration.txt", "num_samples": 8, "seq_len": 5, **given}
    repair = refit()
    repair.calibration = CalibrationConfig(**values)
    with pytest.raises(UserError, match=message):
        repair.identity(tmp_path)


def test_a_text_of_too_few_tokens_is_an_error_too(tmp_path):
    """Where a token may be more than a byte, that is known once it is cut."""
    (tmp_path / "text.txt").write_text("é" * 20)
    repair = refit()
    repair.calibration = CalibrationConfig(source="text_file", path="text.txt", num_samples=8, seq_len=5)
    tokenizer = byte_tokenizer()
    assert repair.samples(tokenizer, tmp_path).input_ids.shape == (8, 5)
    (tmp_path / "text.txt").write_text("é" * 19)
    with pytest.raises(UserError, match="has 38 tokens; repair.calibration.num_samples=8 x"):
        repair.samples(tokenizer, tmp_path)


@pytest.mark.parametrize("source", ["bundled", "text_file"])
def test_its_random_samples_are_not_those_that_the_plan_was_found_on(source, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{number:06d}" for number in range(5000)))
    repair = refit()
    path = "text.txt" if source == "text_file" else None
    repair.calibration = CalibrationConfig(source=source, path=path, num_samples=12, seq_len=8)
    methods = calibration.Calibration(repair.calibration, tmp_path)
    of_method, of_repair = methods.sample(byte_tokenizer()), repair.samples(byte_tokenizer(), tmp_path)
    assert sum(place in of_method.ids for place in of_repair.ids) <= 1
    assert repair.identity(tmp_path)["calibration"] != methods.identity()
    again = repair.samples(byte_tokenizer(), tmp_path)
    assert again.fingerprint == of_repair.fingerprint
    repair.calibration.sampling = "contiguous"  # the beginning of a text is the same for everybody
    methods = calibration.Calibration(repair.calibration, tmp_path)
    assert repair.identity(tmp_path)["calibration"] == methods.identity()


def test_log_lines_about_its_text_name_its_options(monkeypatch, caplog):
    """And those of the job's own calibration name the job's, before and after."""
    monkeypatch.setattr(calibration.texts, "bundled_texts", lambda name: ["a passage"] * 10)
    repair = refit()
    repair.calibration = CalibrationConfig(source="bundled", num_samples=2, seq_len=20)
    caplog.set_level(logging.INFO)
    calibration.Calibration(repair.calibration, None).sample(byte_tokenizer())
    repair.samples(byte_tokenizer(), None)
    calibration.Calibration(repair.calibration, None).sample(byte_tokenizer())
    line = "only 0 of 10 rows have {0}.seq_len=20 tokens, {0}.num_samples=2 are needed: the passages are joined"
    wanted = [line.format(name) for name in ("calibration", "repair.calibration", "calibration")]
    assert [message.partition(" to one")[0] for message in caplog.messages] == wanted
