"""``slm-bench recovery``: our training beside a bare peft and Trainer script, and distillation beside its two halves.

slm-bench recovery                                             the published LoRA settings, SmolLM2
slm-bench recovery model=llama2_7b recovery.max_steps=20       another model, shorter
slm-bench recovery recovery.num_processes=2                    instead: one GPU beside two

The model is pruned to four fifths of its layers by averaging pairs near the top. What recovery=lora takes may be set,
and distillation takes what it shares with it. All sides train on the same rows in the same batches; each runs twice in
turn after a run to warm up (one GPU beside two: twice, no more), and its faster run counts. Ours is timed from the end
of its first validation to its last step: counting and checking are in it, the last checkpoint, which the others do not
write, is not.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pipeline.commands.bench_results import Result, leave
from slm_pipeline.data.batches import Collator
from slm_pipeline.errors import UserError
from slm_pipeline.jobs import command_line
from slm_pipeline.recovery import workers
from slm_pipeline.recovery.base import Log, RecoveryProblem
from slm_pipeline.recovery.distill import Distill
from slm_pipeline.recovery.fine_tuning import FineTuning
from slm_pipeline.recovery.lora import Lora
from slm_pipeline.recovery.spans import changed_spans
from slm_pipeline.surgery.ops.merge import Merge
from slm_pipeline.surgery.plan import Plan

if TYPE_CHECKING:
    from slm_pipeline.data.tokens import Row
    from slm_pipeline.jobs.job import Job
    from slm_pipeline.models.source import ModelSource

_DEFAULTS = [
    "recovery=lora", "recovery.learning_rate=1e-4", "recovery.max_steps=40", "recovery.warmup_steps=5",
    "recovery.num_examples=2560", "recovery.validation_size=8", "evaluation=none", "tracker=jsonl",
]  # fmt: skip


def recovery(words: list[str]) -> None:
    """Measure and print; ``words`` is the command line: overrides as for slm."""
    job = job_of(words)
    lora = job.recovery
    if not isinstance(lora, Lora):
        name = "none" if lora is None else lora.name
        raise UserError(f"recovery={name}: slm-bench recovery measures recovery=lora, and distillation alike")
    results = [scaling(job, lora)] if lora.num_processes > 1 else _side_by_side(job, lora)
    leave("recovery", job, words, results)


def job_of(words: list[str]) -> Job:
    return command_line.compose_job(["slm-bench", "recovery"], words, _DEFAULTS)


def distillation_alike(lora: Lora) -> Distill:
    """With the data, schedule and budget of ``lora``."""
    return Distill(**{option.name: getattr(lora, option.name) for option in fields(FineTuning)})


def _side_by_side(job: Job, lora: Lora) -> list[Result]:
    """Print our speed over a bare script's, and what distillation costs over its two halves."""
    distill = distillation_alike(lora)
    bench = Bench(job)
    print(f"{job.source.name}, {bench.plan.num_layers} of {bench.plan.model['num_layers']} layers", flush=True)
    ours, bare = _best_of_two(lambda: bench.ours(lora), lambda: bench.bare_lora(lora))
    print(
        f"LoRA: {bench.num_tokens / ours:.0f} tokens/s, a bare peft and Trainer script {bench.num_tokens / bare:.0f}"
        f" tokens/s: {bare / ours:.3f} of its speed, {bench.num_tokens} tokens",
        flush=True,
    )
    results = [Result("LoRA, of a bare script's speed", bare / ours, how=f"{bench.num_tokens / ours:.0f} tokens/s")]
    ours, halves = _best_of_two(lambda: bench.ours(distill), lambda: bench.teacher_and_layers(distill))
    print(
        f"distillation of {len(changed_spans(bench.plan))} merged layers: {bench.num_tokens / ours:.0f} tokens/s,"
        f" {ours / halves:.2f} times a forward pass of the teacher and a forward and backward pass of those layers"
    )
    how = f"{bench.num_tokens / ours:.0f} tokens/s"
    return [*results, Result("distillation, of its two halves' time", ours / halves, how=how)]


def scaling(job: Job, options: Lora) -> Result:
    """Print how much faster several processes train than one: the faster of two runs each."""
    lora = Lora(**{**vars(options), "num_processes": 1})
    bench = Bench(job)
    one = min(bench.ours(lora) for _ in range(2))
    tokens, n = bench.num_tokens, options.num_processes
    several = min(bench.ours(options) for _ in range(2))
    print(
        f"{job.source.name}, LoRA: {tokens / one:.0f} tokens/s on one GPU, {bench.num_tokens / several:.0f} on {n}:"
        f" {bench.num_tokens / several / (tokens / one):.2f} times as many, {tokens} tokens"
    )
    how = f"{tokens / one:.0f} and {tokens / several:.0f} tokens/s"
    return Result(f"{n} GPUs, LoRA", one / several, at_least=0.9 * n, how=how)


class Bench:
    """The same rows for everybody, and a fresh pruned model for each run.

    Attributes:
        num_tokens: of the last run of ours, without padding.
    """

    job: Job
    teacher: Any
    tokenizer: Any
    plan: Plan
    rows: list[Row]
    num_tokens: int

    def __init__(self, job: Job):
        from slm_pipeline.models.loading import load_dense

        assert isinstance(job.recovery, FineTuning)
        self.job = job
        self.teacher, self.tokenizer = load_dense(job.source)
        self.teacher.requires_grad_(False)
        self.plan = _pairs(job.source, self.teacher.config.num_hidden_layers)
        self.rows = job.recovery.tokenized_split(self.tokenizer, job.data_dir)[0]
        self.num_tokens = 0

    def ours(self, options: Lora | Distill) -> float:
        """Seconds of training."""
        times: list[float] = []

        def note(metrics: dict[str, float], step: int) -> None:
            if not times or "loss" in metrics:  # the first is a validation's, and so is the very last
                times.append(time.perf_counter())

        out = Path(tempfile.mkdtemp())
        make_problem = functools.partial(_problem, self.job, self.plan, out)
        try:
            if options.num_processes > 1:
                workers.train(options, make_problem, note)
            metrics = options.run(make_problem(note)).metrics
        finally:
            shutil.rmtree(out)
        self.num_tokens = metrics["num_tokens"]
        return times[-1] - times[0]

    def bare_lora(self, options: Lora) -> float:
        """Seconds of what a user would write: peft's adapters, transformers' Trainer, nothing else."""
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

        seed = self.job.config.seed
        set_seed(seed)
        adapters = LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model: Any = get_peft_model(self._pruned(), adapters)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=options.num_steps(self.rows), learning_rate=options.peak_learning_rate,
                warmup_steps=options.warmup(options.num_steps(self.rows)),
                per_device_train_batch_size=options.micro_batch_size,
                gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
                bf16=options.dtype == "bfloat16", use_cpu=model.device.type == "cpu", seed=seed, data_seed=seed,
                logging_steps=options.logging_steps, save_strategy="no", report_to="none", disable_tqdm=True,
                remove_unused_columns=False,
            )  # fmt: skip
            arguments._n_gpu = min(arguments.n_gpu, 1)
            collator = Collator(self.tokenizer.pad_token_id or 0)
            trainer = Trainer(model=model, args=arguments, train_dataset=self.rows, data_collator=collator)
            trainer.remove_callback(PrinterCallback)
            started = time.perf_counter()
            trainer.train()
            return time.perf_counter() - started

    def teacher_and_layers(self, options: Distill) -> float:
        """Seconds for one forward pass of the teacher, and one forward and backward pass of the merged layers, on as
        many batches: no optimizer, no Trainer."""
        import torch

        from slm_pipeline.engine.blocks import entering_and_leaving
        from slm_pipeline.models.view import ModelView

        view = ModelView(self.teacher)
        spans = changed_spans(self.plan)
        layers = [ModelView(self._pruned()).layers[span.position].float() for span in spans]
        firsts, lasts = [span.first for span in spans], [span.last for span in spans]
        collator = Collator(self.tokenizer.pad_token_id or 0)
        num_batches = options.num_steps(self.rows) * options.batch_size // options.micro_batch_size
        size = options.micro_batch_size
        started = time.perf_counter()
        for number in range(num_batches):
            start = number * size % (len(self.rows) - size + 1)
            batch = {name: value.to(view.device) for name, value in collator(self.rows[start : start + size]).items()}
            del batch["labels"]
            with torch.autocast(view.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                states, _, arguments = entering_and_leaving(view, batch, firsts, [view.num_layers - 1], lasts)
                for span, layer in zip(spans, layers, strict=True):
                    args, kwargs = arguments[span.last]
                    output = layer(states[span.first], *args, **kwargs)
                    (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _pruned(self) -> Any:
        from slm_pipeline.models.loading import load_dense
        from slm_pipeline.surgery.apply import apply

        return apply(self.plan, load_dense(self.job.source)[0])


def _problem(job: Job, plan: Plan, out: Path, log: Log) -> RecoveryProblem:
    from slm_pipeline.models.loading import load_dense
    from slm_pipeline.surgery.apply import apply

    model, tokenizer = load_dense(job.source)
    return RecoveryProblem(
        teacher=lambda: load_dense(job.source)[0],
        model=apply(plan, model),
        tokenizer=tokenizer,
        plan=plan,
        out=out,
        base_path="pruned",
        seed=job.config.seed,
        data_dir=job.data_dir,
        log=log,
    )


def _pairs(source: ModelSource, num_layers: int) -> Plan:
    """A fifth of the layers gone, by averaging pairs below the last layer, so that the teacher has to run almost to its
    end, as under SLM's plans; what is in the weights does not matter here."""
    top = num_layers - 1 - 2 * round(num_layers / 5)
    pairs = [(layer, layer + 1) for layer in range(top, num_layers - 1, 2)]
    return Plan(
        model={"name": source.name, "fingerprint": source.fingerprint, "num_layers": num_layers},
        method="pairs",
        options={},
        calibration={},
        ops=[Merge(pair, "mean") for pair in pairs],
    )


def _best_of_two(ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    ours(), theirs()  # kernels are chosen, files are in memory
    runs = [(ours(), theirs()) for _ in range(2)]
    return min(run[0] for run in runs), min(run[1] for run in runs)
