"""Where the YAML files are that come with this package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent
_ROOT = _HERE if (_HERE / "conf").is_dir() else _HERE.parent  # an installed wheel carries conf/ and sweeps/ inside
CONF_DIR = _ROOT / "conf"
SWEEPS_ROOT = _ROOT  # the folder that holds the shipped sweeps/
