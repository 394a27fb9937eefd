"""Which changes to the code would no test notice? python tests/mutate.py --workers 16 --minutes 9 --out results.jsonl

Each mutant is a copy of the repository with one small change in methods/, surgery/, or a function that says what an
artefact depends on, see `IDENTITIES`. The tests beside its module run first, then those of its package and its users,
until one fails. The order is random, drawn from the seed, so the part done is a fair sample of all. Started again with
the same file, it goes on where it stopped; a module that has changed since begins anew. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("slm_pipeline", "hydra_plugins", "conf", "sweeps", "tests", "docs", "pyproject.toml", "README.md", "LICENSE")
WHOLE = ("methods", "surgery")  # packages that are mutated everywhere
IDENTITIES = {  # package -> its functions that say what an artefact depends on; no others are mutated there
    "jobs/stages": ("identity", "_checkpoint", "checkpoint_id"),
    "evaluation": ("identity", "settings"),
    "recovery": ("identity", "options"),
    "data": ("identity", "_text_identity"),
}
KEYS = ["tests/config/test_plugins.py", "tests/jobs/test_resume.py", "tests/test_extending.py"]  # tests of them
USERS = {  # tests of those who use a package or module, after its own
    "methods": ["tests/config"],
    "methods/base": KEYS,
    "methods/target": KEYS,
    "surgery": ["tests/methods", "tests/models/test_checkpoint.py", "tests/models/test_sublayers.py"],
    "surgery/ops": ["tests/jobs/test_resume.py"],
    "jobs": KEYS,
    "evaluation": ["tests/jobs", *KEYS],
    "recovery": ["tests/jobs", *KEYS],
    "data": ["tests/jobs", *KEYS],
}
NOT_HERE = "not real and not browser and not slurm"

OPPOSITES: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros_like": "ones_like", "ones_like": "zeros_like"}
SPOKEN = {
    "UserError",
    "ValueError",
    "tqdm",
    "warning",
    "info",
    "set_postfix_str",
}  # calls whose arguments are for people


@dataclass(frozen=True)
class Mutant:
    """One change. ``key`` depends on the module's text, so that no result outlives it."""

    file: str
    number: int
    line: int
    change: str
    key: str

    def text(self) -> str:
        """The module with the change."""
        tree = ast.parse((REPOSITORY / self.file).read_text(encoding="utf-8"))
        return ast.unparse(ast.fix_missing_locations(Mutator(self.number).visit(tree)))


class Mutator(ast.NodeTransformer):
    """Makes the change number ``wanted`` of a tree; ``found`` has line and words of all up to there."""

    def __init__(self, wanted: int = -1):
        self.wanted = wanted
        self.found: list[tuple[int, str]] = []

    def change(self, node: Any, words: str) -> bool:
        """Whether the next change, which is this one, is wanted."""
        self.found.append((node.lineno, words))
        return len(self.found) - 1 == self.wanted

    def swap(self, node: Any, kind: ast.AST) -> ast.AST:
        other = OPPOSITES.get(type(kind))
        if other and self.change(node, f"{type(kind).__name__} -> {other.__name__}"):
            return other()
        return kind

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
            return node
        if isinstance(node, ast.Call) and name_of(node.func) in SPOKEN:
            return node
        if isinstance(node, ast.If) and name_of(node.test) == "TYPE_CHECKING":
            return node
        return super().visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.visit(default) for default in node.args.kw_defaults]
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Compare(self, node: ast.Compare) -> Any:
        node.ops = [self.swap(node, op) for op in node.ops]  # type: ignore[misc]
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        node.op = self.swap(node, node.op)  # type: ignore[assignment]
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        node.op = self.swap(node, node.op)  # type: ignore[assignment]
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        node.op = self.swap(node, node.op)  # type: ignore[assignment]
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, (ast.Not, ast.USub)) and self.change(node, f"no {type(node.op).__name__}"):
            return node.operand
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self.change(node, f"not {node.value}") else node
        if isinstance(node.value, (int, float)):
            return ast.Constant(node.value + 1) if self.change(node, f"{node.value} -> {node.value + 1}") else node
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in NAMES and self.change(node, f"{node.id} -> {NAMES[node.id]}"):
            return ast.Name(NAMES[node.id], node.ctx)
        return node

    def visit_If(self, node: ast.If) -> Any:
        if not isinstance(node.test, ast.Compare) and self.change(node, "if not"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
            return node
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        if self.change(node, "the other branch"):
            node.body, node.orelse = node.orelse, node.body
            return node
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        for index, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "default_factory") and self.change(keyword.value, f"without {keyword.arg}="):
                del node.keywords[index]
                return node
        return self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> Any:
        for index, key in enumerate(node.keys):
            words = "**" + ast.unparse(node.values[index]) if key is None else ast.unparse(key)
            if self.change(node.values[index], f"without {words}"):
                del node.keys[index], node.values[index]
                return node
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.slice, ast.Slice) and self.change(node, f"without [{ast.unparse(node.slice)}]"):
            return node.value
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Call) and self.change(node, f"without {ast.unparse(node)[:60]}"):
            return ast.copy_location(ast.Pass(), node)
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        return ast.copy_location(ast.Pass(), node) if self.change(node, "without raise") else node

    def visit_Delete(self, node: ast.Delete) -> Any:
        return ast.copy_location(ast.Pass(), node) if self.change(node, "without del") else node

    def visit_Break(self, node: ast.Break) -> Any:
        return ast.copy_location(ast.Continue(), node) if self.change(node, "no break") else node


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def is_of(file: str, name: str) -> bool:
    """Whether a file is the module, or in the package, of that name, such as ``surgery/ops``."""
    return file == f"slm_pipeline/{name}.py" or file.startswith(f"slm_pipeline/{name}/")


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All changes to a module; outside `WHOLE` those in the functions of `IDENTITIES`."""
    source, file = path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY))
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    whole = any(is_of(file, name) for name in WHOLE)
    names = [function for package, functions in IDENTITIES.items() if is_of(file, package) for function in functions]
    tree = ast.parse(source)
    spans = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    counter = Mutator()
    counter.visit(tree)
    for number, (line, words) in enumerate(counter.found):
        if whole or any(line in span for span in spans):
            yield Mutant(file, number, line, words, f"{file}:{digest}:{number}")


def all_mutants(only: str) -> list[Mutant]:
    files = [path for name in (*WHOLE, *IDENTITIES) for path in (REPOSITORY / "slm_pipeline" / name).rglob("*.py")]
    return [mutant for path in sorted(files) if re.search(only, str(path)) for mutant in mutants_of(path)]


def places_of(file: str) -> list[str]:
    """Where the tests for a module lie: beside it, in its package, those of its users."""
    folder = Path("tests", *Path(file).parent.parts[1:])
    users = [place for name, places in USERS.items() if is_of(file, name) for place in places]
    return [str(folder), *map(str, list(folder.parents)[:-2]), *users]


def tests_in(place: str) -> list[str]:
    path = REPOSITORY / place
    files = [path] if path.is_file() else path.rglob("test_*.py")
    return [str(file.relative_to(REPOSITORY)) for file in files]


def test_files(file: str, seconds: dict[str, float]) -> list[str]:
    """Tests for a module: its own, those of its folder, its package and its users; the fast ones of each first."""
    found: list[str] = []
    for place in places_of(file):
        found += sorted((name for name in tests_in(place) if name in seconds), key=lambda name: seconds[name])
    own = [name for name in found if Path(name).stem == f"test_{Path(file).stem}"]
    return list(dict.fromkeys([*own, *found]))


def run_tests(folder: Path, tests: list[str]) -> int:
    """Start pytest in a copy of this process, which has imported what takes long; its process id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    status = 3
    try:
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", NOT_HERE]
        status = int(pytest.main([*options, f"--basetemp={folder / 'tmp'}", "-c", "pyproject.toml", *tests]))
    finally:
        os._exit(status)


class Pool:
    """So many copies of the repository, in each of which one test run is under way."""

    def __init__(self, workers: int):
        self.root = Path(tempfile.mkdtemp(prefix="slm_mutants_"))
        self.free = [self.root / str(number) for number in range(workers)]
        self.running: dict[int, tuple[Any, Path, float, float]] = {}
        for folder in self.free:
            for part in PARTS:
                source = REPOSITORY / part
                ignore = shutil.ignore_patterns("__pycache__")
                if source.is_dir():
                    shutil.copytree(source, folder / part, ignore=ignore)
                else:
                    folder.mkdir(exist_ok=True)
                    shutil.copy(source, folder / part)

    def start(self, job: Any, tests: list[str], timeout: float, mutant: Mutant | None = None) -> None:
        folder = self.free.pop()
        if mutant is not None:
            (folder / mutant.file).write_text(mutant.text(), encoding="utf-8")
        now = time.monotonic()
        self.running[run_tests(folder, tests)] = job, folder, now, now + timeout

    def finished(self) -> Iterator[tuple[Any, int | None, float, str]]:
        """Jobs that have ended: status, None for one that took too long, seconds, and the first failed test."""
        for process, (job, folder, started, deadline) in list(self.running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            late = not done and time.monotonic() > deadline
            if done or late:
                self.end(process, wait=not done)
                text = (folder / "output.txt").read_text(errors="replace") if not late else ""
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
                code = None if late else os.waitstatus_to_exitcode(status)
                yield job, code, time.monotonic() - started, failed[1] if failed else ""

    def end(self, process: int, *, wait: bool) -> None:
        """Kill what a run has started, and put its folder right."""
        job, folder, *_ = self.running.pop(process)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        if wait:
            os.waitpid(process, 0)
        if isinstance(job, Mutant):
            shutil.copy(REPOSITORY / job.file, folder / job.file)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        self.free.append(folder)

    def close(self) -> None:
        for process in list(self.running):
            self.end(process, wait=True)
        shutil.rmtree(self.root, ignore_errors=True)


def measure_tests(pool: Pool, names: list[str], until: float, known: dict[str, float | None], note: Any) -> None:
    """Run every test file on its own, with nothing changed, and note its seconds in ``known``.

    A file that fails says nothing of mutants: it gets None, is left out from then on, and is named.
    """
    waiting = [name for name in names if name not in known]
    while (waiting or pool.running) and time.monotonic() < until:
        while waiting and pool.free:
            name = waiting.pop()
            pool.start(name, [name], 600)
        for name, status, took, failed in pool.finished():
            known[name] = round(took, 1) if status in (0, 5) else None  # 5: no test of it can run here
            note({"unchanged": name, "seconds": known[name], "test": failed})
        time.sleep(0.05)
    for name in names:
        if known.get(name, 0) is None:
            print(f"left out, it fails unchanged: {name}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """What is known; half of the last line, where the process was killed, is cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=9, help="until the last test is started or stopped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression on paths of modules")
    parser.add_argument("--survivors", action="store_true", help="try again those that no test noticed")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes

    mutants = all_mutants(given.only)
    random.Random(given.seed).shuffle(mutants)
    rows = read(given.out)
    results = {row["key"]: row for row in rows if "key" in row}
    if given.survivors:
        results = {key: row for key, row in results.items() if row["status"] != "survived"}
    places = {place for file in {mutant.file for mutant in mutants} for place in places_of(file)}
    names = sorted({name for place in places for name in tests_in(place)})
    code = sorted(path for part in ("slm_pipeline", "tests") for path in (REPOSITORY / part).rglob("*.py"))
    suite = hashlib.sha256(json.dumps([names, [path.read_text() for path in code]]).encode()).hexdigest()[:12]

    import hydra  # noqa: F401  # what takes long to import, once for all
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    assert not any(name.startswith("slm_pipeline") for name in sys.modules)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = Pool(given.workers)
    try:
        with given.out.open("a", encoding="utf-8") as out:

            def note(row: dict[str, Any]) -> None:
                out.write(json.dumps({"suite": suite, **row}) + "\n")
                out.flush()

            known = {row["unchanged"]: row["seconds"] for row in rows if "unchanged" in row and row["suite"] == suite}
            measure_tests(pool, names, until, known, note)
            seconds = {name: took for name, took in known.items() if took is not None}
            waiting = [mutant for mutant in mutants if mutant.key not in results][::-1]
            while (waiting or pool.running) and time.monotonic() < until:
                while waiting and pool.free:
                    mutant = waiting.pop()
                    tests = test_files(mutant.file, seconds)
                    pool.start(mutant, tests, 60 + 3 * sum(seconds[name] for name in tests), mutant)
                for mutant, status, took, failed in pool.finished():
                    said = {None: "timeout", 0: "survived"}.get(status, "killed")
                    row = {"key": mutant.key, "file": mutant.file, "line": mutant.line, "change": mutant.change,
                           "status": said, "test": failed, "seconds": round(took, 1)}  # fmt: skip
                    results[mutant.key] = row
                    note(row)
                time.sleep(0.05)
    finally:
        pool.close()
    report(mutants, results)


def report(mutants: list[Mutant], results: dict[str, dict[str, Any]]) -> None:
    """The score over the part of the order that is done without a gap: what is under way still is mostly survivors."""
    done = [results[mutant.key] for mutant in mutants if mutant.key in results]
    first = next((index for index, mutant in enumerate(mutants) if mutant.key not in results), len(mutants))
    fair = [results[mutant.key]["status"] for mutant in mutants[:first]]
    for row in sorted((row for row in done if row["status"] == "survived"), key=lambda row: (row["file"], row["line"])):
        print(f"survived: {row['file']}:{row['line']}: {row['change']}")
    if fair:
        noticed = sum(status != "survived" for status in fair)
        print(
            f"{noticed} of {len(fair)} mutants noticed ({100 * noticed / len(fair):.1f} %), a random part of all",
            end=" ",
        )
        print(f"{len(mutants)}; {fair.count('timeout')} of them by a timeout; {len(done)} are done")


if __name__ == "__main__":
    main()
