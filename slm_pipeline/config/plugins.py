"""Plugins: packages of others that bring options of their own. No torch.

A plugin is any importable package. ``plugins=[mypackage]`` on the command line names one; an installed package that
declares an entry point in the group ``slm_pipeline.plugins`` is one wherever it is installed:

    [project.entry-points."slm_pipeline.plugins"]
    mypackage = "mypackage"

Its conf/ holds options as ours does (conf/method/mine.yaml), ``_target_`` may name its classes, and its ``__init__``
may add to our registries, such as `slm_pipeline.engine.similarities.SIMILARITIES`. It is imported before anything is
composed, for ``slm --help`` and ``dry_run=true`` too, so its modules import torch inside functions, as ours do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from slm_pipeline.config.folders import CONF_DIR, SWEEPS_ROOT
from slm_pipeline.errors import UserError, refused_in_one_line

ENTRY_POINTS = "slm_pipeline.plugins"
_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Plugin:
    """A package that was imported.

    Attributes:
        name: to import it by, such as ``mypackage`` or ``company.pruning``.
        file: of the module, ``__init__.py`` of a package.
        digest: of its code when it was imported, hexadecimal: of the names and contents of all its .py files.
    """

    name: str
    file: Path
    digest: str

    @property
    def conf(self) -> Path:
        """The folder of its options; need not be there."""
        return self.file.parent / "conf" if self.file.name == "__init__.py" else self.file.with_suffix("") / "conf"

    def options(self, group: str) -> list[Path]:
        """The YAML files of its options of a group."""
        return sorted((self.conf / group).glob("*.yaml"))


_in_use: list[Plugin] = []
_imported: dict[str, tuple[ModuleType, Plugin]] = {}  # an edit after the import is not what runs


def in_use() -> tuple[Plugin, ...]:
    """Those of the current configuration."""
    return tuple(_in_use)


def use(named: Sequence[str]) -> None:
    """Import the plugins that are ``named`` and those that are installed; they replace the ones before.

    A named one may lie in the folder where the command was started. That folder is looked at last, so that a file in it
    stands in for no installed module, and only if a plugin is named: nothing runs because it lies there.

    Raises:
        UserError: it cannot be imported, or brings an option of a name that is taken.
    """
    if named and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    found: dict[str, Plugin] = {}
    for name, origin in (*_installed(), *((name, f"plugins=[{name}]") for name in named)):
        if name not in found:
            found[name] = _load(name, origin)
            _check_options(found[name], list(found.values())[:-1])
    _in_use[:] = found.values()


@functools.cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Of each entry point what it names, and where it is from, in words."""
    found = []
    for entry in entry_points(group=ENTRY_POINTS):
        owner = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
        found.append((entry.value, f"the entry point {ENTRY_POINTS}: {entry.name}{owner}"))
    return tuple(sorted(set(found)))


def _load(name: str, origin: str) -> Plugin:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise UserError(f"{origin}: {name[:100]!r} is not the name of a package, such as mypackage or company.pruning")
    if name.partition(".")[0] == _OURS:
        raise UserError(f"{origin}: {name} is of this package and needs no naming")
    with refused_in_one_line(f"{origin} cannot be imported"):
        module = importlib.import_module(name)
    if not getattr(module, "__file__", None):
        raise UserError(f"{origin}: {name} has no code of its own; a plugin is a folder with an __init__.py")
    if name not in _imported or _imported[name][0] is not module:
        file = Path(str(module.__file__)).resolve()
        _imported[name] = module, Plugin(name, file, _digest(file))
    return _imported[name][1]


def _digest(file: Path) -> str:
    folder = file.parent
    files = sorted(folder.rglob("*.py")) if file.name == "__init__.py" else [file]
    code = hashlib.sha256()
    for one in files:
        content = one.read_bytes()
        code.update(f"{one.relative_to(folder)}\n{len(content)}\n".encode())
        code.update(content)
    return code.hexdigest()


def _check_options(plugin: Plugin, others: Iterable[Plugin]) -> None:
    """Raise `UserError` if an option has the name of one of ours or of another plugin's."""
    for file in sorted(plugin.conf.rglob("*.yaml")):
        option = file.relative_to(plugin.conf)
        whose = [f"the plugin {other.name}" for other in others if (other.conf / option).exists()]
        if (CONF_DIR / option).exists() or (option.parts[0] == "sweeps" and (SWEEPS_ROOT / option).exists()):
            whose.insert(0, "slm_pipeline")
        if whose:
            raise UserError(
                f"the plugin {plugin.name} brings {option}, and so does {whose[0]}; give its option another name"
            )


def is_named(target: str) -> bool:
    """Whether the module or class of this whole name belongs to one in use."""
    return any(target.startswith(f"{plugin.name}.") for plugin in _in_use)


def code_of(*made: Any) -> dict[str, str]:
    """What the plugins' part in classes or functions is, for keys: by plugin the digest of its code; empty for ours.

    So the results of a plugin are made again when its code changes, and those of two plugins never stand for one
    another, whatever names they give.

    Raises:
        UserError: one is neither ours nor a plugin's, so that nobody knows whether it has changed.
    """
    found = {}
    for one in made:
        module = str(one.__module__)
        if module.partition(".")[0] == _OURS:
            continue
        owners = [plugin for plugin in _in_use if f"{module}.".startswith(f"{plugin.name}.")]
        if not owners:
            raise UserError(f"{module}.{one.__qualname__} is of no plugin; name its package: plugins=[{module}]")
        found[owners[0].name] = owners[0].digest
    return found


def without_options() -> str:
    """The end of a message about an option that nobody has: which plugins bring none at all."""
    bare = [f"{plugin.name} ({plugin.conf})" for plugin in _in_use if not plugin.conf.is_dir()]
    return f"; these plugins have no conf/: {', '.join(bare)}" if bare else ""
