"""What the efficiency measure would have found."""

from __future__ import annotations

from typing import Any


def measured_speed(device: str, **medians: float) -> dict[str, Any]:
    """With these medians, such as ``speedup=1.25``, of four runs that were all alike."""
    return {
        **medians,
        "spread": {
            name: {"median": value, "q1": value, "q3": value, "mean": value, "std": 0.0, "number": 4}
            for name, value in medians.items()
        },
        "weights_gb": 2.0,
        "num_parameters": 500_000_000,
        "cache_bytes_per_token": 64,
        "peak_memory_gb": 2.5,
        "device": device,
        "dtype": "float32",
        "mode": "eager",
        "batch_size": 1,
        "prompt_len": 4,
        "output_len": 8,
        "num_runs": 5,
        "num_warmup": 1,
    }
