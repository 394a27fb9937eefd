"""``slm-fetch``: fetch what the default run needs, once: the bundled model, the zero-shot tasks and all text."""

from __future__ import annotations

import argparse
import logging

from slm_pipeline.cli import errors_in_one_line
from slm_pipeline.commands.arguments import parsed
from slm_pipeline.data.tasks import bundled_task_files
from slm_pipeline.models.bundled import model_dir


def main() -> None:
    """Console entry point."""
    parsed(argparse.ArgumentParser(prog="slm-fetch", description=__doc__))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with errors_in_one_line():
        model_dir("smollm2_135m")
        bundled_task_files()


if __name__ == "__main__":
    main()
