"""``slm-bench``: ours beside theirs, in one run.

slm-bench search        searches that try candidates, beside the loops that their authors published
slm-bench methods       all methods, likewise
slm-bench repair        closed-form repairs: time and memory
slm-bench joint         the joint search for depth and width: time and memory
slm-bench sweep         what the jobs of a study share
slm-bench efficiency    what pruning buys in speed
slm-bench recovery      training beside a bare peft and Trainer script
slm-bench disk          loading and saving, beside plain transformers
slm-bench performance   the table of docs/performance.md

``slm-bench GROUP --help`` says more. Words with a = are overrides as for slm. Each leaves its numbers in
``OUTPUT_DIR/bench/GROUP/TIME``, as JSON and as a picture that ``slm-report OUTPUT_DIR`` has on its page.
"""

from __future__ import annotations

import sys

from slm_pipeline.cli import VERSION, errors_in_one_line
from slm_pipeline.commands import (
    bench_disk,
    bench_efficiency,
    bench_methods,
    bench_performance,
    bench_recovery,
    bench_stages,
    bench_sweep,
)
from slm_pipeline.commands.arguments import answer_shell, help_text

GROUPS = {
    "search": (bench_methods.search, bench_methods.__doc__),
    "methods": (bench_methods.methods, bench_methods.__doc__),
    "repair": (bench_stages.repair, bench_stages.__doc__),
    "joint": (bench_stages.joint, bench_stages.__doc__),
    "sweep": (bench_sweep.sweep, bench_sweep.__doc__),
    "efficiency": (bench_efficiency.benchmark, bench_efficiency.__doc__),
    "recovery": (bench_recovery.recovery, bench_recovery.__doc__),
    "disk": (bench_disk.disk, bench_disk.__doc__),
    "performance": (bench_performance.performance, bench_performance.__doc__),
}


def _words_of(group: str) -> list[str]:
    """What a shell may complete after ``slm-bench GROUP``."""
    return [*(bench_methods.METHODS if group in ("methods", "search") else ()), "model=", "pruning_ratio="]


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    answer_shell(GROUPS, _words_of)
    run, docstring = GROUPS.get(arguments[0] if arguments else "", (None, None))
    if not arguments or {"-h", "--help"} & set(arguments):
        with errors_in_one_line():
            print(help_text(docstring or __doc__))
        sys.exit(0 if arguments else 2)
    if "--version" in arguments:
        print(VERSION)
        return
    if run is None:
        print(f"error: unknown benchmark {arguments[0]!r}; there are: {', '.join(GROUPS)}", file=sys.stderr)
        sys.exit(2)
    with errors_in_one_line():
        run(arguments[1:])


if __name__ == "__main__":
    main()
