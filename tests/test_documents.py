"""What the documents say of one another and of the package holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import slm_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_has_one(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == slm_pipeline.__version__
    newest = re.search(r"^## \[.*?\].*$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert slm_pipeline.__version__ in newest[0]


def test_the_citation_has_what_its_format_asks_for():
    """CFF 1.2.0: what must be there, of the software and of each reference, and persons' or entities' names."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert [reference["doi"] for reference in citation["references"]] == [
        "10.48550/arXiv.2502.19159",
        "10.48550/arXiv.2510.15304",
    ]
    for work in (citation, *citation["references"]):
        assert {"title", "authors", "type"} <= work.keys()
        assert all(author.keys() in ({"name"}, {"given-names", "family-names"}) for author in work["authors"])


def test_the_targets_of_make_that_documents_name_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"\bmake ([a-z-]+)(?=`|  )", document.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"
