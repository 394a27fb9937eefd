"""What the processes of one training tell one another; with a single process, nothing."""

from __future__ import annotations

from slm_pipeline.machine.ranks import count, of_first, rank, summed, wait

__all__ = ["Trained", "count", "of_first", "rank", "summed", "wait"]


class Trained(Exception):
    """Ends a process's part when the finished checkpoints lie on disk and it has nothing more to give."""
