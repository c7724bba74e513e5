"""The documents name files and make targets that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HOMES = [ROOT, ROOT / "kvstore"]


def named_files(text: str) -> list[str]:
    """Files of the code that a document names in backticks, in order."""
    return re.findall(r"`([a-z0-9_/]+\.(?:py|proto))`", text)


def missing(text: str) -> list[str]:
    """Those named that do not exist. One beside the file named before it counts: "`client/view.py`, `links.py`"."""
    lost, beside = [], HOMES
    for name in named_files(text):
        found = next((home / name for home in [*HOMES, *beside] if (home / name).exists()), None)
        if found is None:
            lost.append(name)
        else:
            beside = [found.parent]
    return lost


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    assert missing(document.read_text()) == []


def test_a_file_that_does_not_exist_is_noticed() -> None:
    assert missing("`kvstore/keys.py` and `kvstore/nowhere.py`, `client/view.py` with `links.py`") == [
        "kvstore/nowhere.py"
    ]


def test_the_documents_name_files_at_all() -> None:
    assert sum(len(named_files(document.read_text())) for document in DOCUMENTS) > 50


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)", document.read_text()))
        assert named <= targets, document.name
