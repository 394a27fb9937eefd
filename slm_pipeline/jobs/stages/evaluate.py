"""Evaluate: score one checkpoint. One file per finished number, so that a killed evaluation goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slm_pipeline.data.overlap import RUN, overlaps, word_passages
from slm_pipeline.evaluation import efficiency
from slm_pipeline.jobs.job import Job
from slm_pipeline.jobs.stages.base import Stage
from slm_pipeline.jobs.stages.merge import load_pruned
from slm_pipeline.jobs.tracking import Tracker
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.store.artifact import Artifact
from slm_pipeline.store.files import write_json
from slm_pipeline.store.unfinished import note_complete

log = logging.getLogger(__name__)

VERSION = 2  # 2: CoMe keeps the q/k gains of OLMo 2 with their rows
_FORCED_BY = {  # as in `runner.steps`: a forced stage forces those that read its result
    "dense": {"evaluate"},
    "pruned": {"calibrate", "merge", "evaluate"},
    "recovered": {"calibrate", "merge", "recover", "evaluate"},
}


class Evaluate(Stage):
    """Scores ``target``: dense, pruned or recovered. Leaves one JSON file per task and corpus.

    Where speed is measured too, the result holds both, and belongs to the machine; the scores alone are an artefact
    of their own beside it.
    """

    stage = "evaluate"

    def __init__(self, target: str):
        self.target = target
        self.name = f"evaluate_{target}"
        self.needs = {"dense": (), "pruned": ("merge",), "recovered": ("recover",)}[target]

    def identity(self, job: Job, results: Mapping[str, Artifact]) -> dict[str, Any] | None:
        """None until the checkpoint is known: a checkpoint is scored once, whichever job made it."""
        checkpoint = self._checkpoint(job, results)
        if checkpoint is None:
            return None
        scores = self._scores_identity(job, checkpoint)
        speed = job.config.evaluation.efficiency
        if not speed.enabled:
            return scores
        settings = {**scores["settings"], "efficiency": dataclasses.asdict(speed)}
        return {**scores, "settings": settings, "machine": efficiency.machine(job.config.model.device)}

    def _scores_identity(self, job: Job, checkpoint: str) -> dict[str, Any]:
        """What the scores depend on: not how fast the model is, nor where that is measured."""
        settings = {**dataclasses.asdict(job.config.evaluation), "efficiency": None}
        del settings["of"]
        return {
            "version": VERSION,
            "checkpoint": checkpoint,
            "settings": settings,
            "data": job.identities["evaluation"],
        }

    def _checkpoint(self, job: Job, results: Mapping[str, Artifact]) -> str | None:
        if self.target == "dense":
            return job.source.fingerprint
        if self.target == "pruned":
            merge = results["merge"]
            return merge.record()["result"]["checkpoint"] if merge.done else None
        return f"recovered:{results['recover'].key}" if "recover" in results else None

    def preflight(self, job: Job) -> None:
        """Every text has a window of tokens, lm-eval's own data can be had, and what is generated has positions; see
        the measures' ``preflight``."""
        from slm_pipeline.evaluation import perplexity, zero_shot
        from slm_pipeline.models.loading import load_dense_tokenizer, num_positions

        settings, text = job.config.evaluation, job.config.evaluation.perplexity
        speed = settings.efficiency
        tokenizer = load_dense_tokenizer(job.source)
        perplexity.preflight(tokenizer, text.corpora, window=text.window, bos=text.bos, data_dir=job.data_dir)
        zero_shot.preflight(tokenizer, settings.tasks, settings.data)
        if speed.enabled:
            efficiency.preflight(tokenizer, speed.prompt, speed.output_len, num_positions(job.source))

    def run(self, job: Job, results: Mapping[str, Artifact], out: Path, tracker: Tracker) -> dict[str, Any]:
        settings = job.config.evaluation
        loaded = functools.cache(lambda: self._load(job, results))
        if not settings.efficiency.enabled:
            return self._scores(job, loaded, out)
        scores: dict[str, Any] = {}
        if settings.tasks or settings.perplexity.corpora:  # an artefact of their own, for jobs on any machine
            checkpoint = self._checkpoint(job, results)
            assert checkpoint is not None
            own = Artifact(job.store, self.stage, self._scores_identity(job, checkpoint))
            forced = not _FORCED_BY[self.target].isdisjoint(job.config.force)
            record, _ = own.produce(functools.partial(self._scores, job, loaded), force=forced)
            scores = record["result"]
        options = dataclasses.asdict(settings.efficiency)
        del options["enabled"]
        speed = _finished(out / "efficiency.json", lambda: efficiency.efficiency(*loaded(), **options))
        return {**scores, "efficiency": speed}

    def _scores(self, job: Job, loaded: Callable[[], tuple[Any, Any]], out: Path) -> dict[str, Any]:
        from slm_pipeline.evaluation.zero_shot import score_task

        settings = job.config.evaluation
        model, tokenizer = loaded()
        scores: dict[str, Any] = {"zero_shot": {}, "perplexity": {}}
        for number, corpus in enumerate(settings.perplexity.corpora):  # two files may have the same name
            scores["perplexity"][corpus] = _finished(
                out / f"perplexity_{number}_{Path(corpus).stem}.json",
                lambda corpus=corpus: self._perplexity(job, model, tokenizer, corpus),  # type: ignore[misc]
            )
        for task in settings.tasks:
            scores["zero_shot"][task] = _finished(
                out / f"{task}.json",
                lambda task=task: score_task(  # type: ignore[misc]
                    model,
                    tokenizer,
                    task,
                    data=settings.data,
                    limit=settings.limit,
                    batch_size=settings.batch_size,
                    data_dir=job.data_dir,
                ),
            )
        scored = settings.tasks or settings.perplexity.corpora
        if scored and self.target == "recovered" and isinstance(job.recovery, FineTuning):
            scores["overlap"] = _finished(out / "overlap.json", lambda: self._overlap(job, tokenizer))
        return {kind: values for kind, values in scores.items() if values}

    def _overlap(self, job: Job, tokenizer: Any) -> dict[str, dict[str, int]]:
        """Evaluation documents that are found in the recovery's training data; see `overlaps`."""
        from slm_pipeline.evaluation.perplexity import corpus_tokens
        from slm_pipeline.evaluation.zero_shot import task_documents

        assert isinstance(job.recovery, FineTuning)
        settings, text = job.config.evaluation, job.config.evaluation.perplexity
        documents = {
            task: task_documents(task, data=settings.data, limit=settings.limit, data_dir=job.data_dir)
            for task in settings.tasks
        }
        for corpus in text.corpora:
            input_ids, _ = corpus_tokens(
                tokenizer, corpus, window=text.window, max_tokens=text.max_tokens, data_dir=job.data_dir
            )
            scored = tokenizer.decode(input_ids, clean_up_tokenization_spaces=False)
            documents[f"perplexity/{corpus}"] = word_passages(scored)
        train, _ = job.recovery.examples(job.data_dir)
        return overlaps(documents, train)

    def _perplexity(self, job: Job, model: Any, tokenizer: Any, corpus: str) -> dict[str, Any]:
        from slm_pipeline.evaluation.perplexity import corpus_tokens, perplexity

        settings = job.config.evaluation.perplexity
        input_ids, about = corpus_tokens(
            tokenizer, corpus, window=settings.window, max_tokens=settings.max_tokens, data_dir=job.data_dir
        )
        result = perplexity(
            model,
            input_ids,
            window=settings.window,
            stride=settings.stride,
            bos_token_id=tokenizer.bos_token_id if settings.bos else None,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
            label=Path(corpus).stem,
        )
        return {**about, **result}

    def publish(self, artifact: Artifact, tracker: Tracker, *, reused: bool) -> None:
        scores = artifact.record()["result"]
        metrics = {task: result["score"] for task, result in scores.get("zero_shot", {}).items()}
        for corpus, result in scores.get("perplexity", {}).items():
            metrics[f"perplexity/{corpus}"] = result["perplexity"]
        tracker.log(metrics, stage=self.name)
        for name, found in scores.get("overlap", {}).items():
            log.warning(
                "%s: %d of %d documents share %d words in a row with the recovery's training data",
                name, found["documents"], found["of"], RUN,
            )  # fmt: skip

    def _load(self, job: Job, results: Mapping[str, Artifact]) -> tuple[Any, Any]:
        from slm_pipeline.models.loading import load_checkpoint, load_dense, load_tokenizer

        if self.target == "dense":
            return load_dense(job.source)
        if self.target == "pruned":
            return load_pruned(job, results["merge"])
        folder = results["recover"].path / "model"
        return load_checkpoint(folder, job.config.model), load_tokenizer(folder)


def _finished(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in ``path``, computed and written first when it is not there."""
    if not path.exists():
        write_json(path, compute())
        note_complete(path.parent, path.name)
    return json.loads(path.read_text(encoding="utf-8"))
