"""Phrases that a reader has to read twice are not in the repository (.github/CONTRIBUTING.md, Style)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml")
QUOTED = ("tests/test_language.py", ".github/CONTRIBUTING.md", "CHANGELOG.md")  # the first two name the phrases
DATA = re.compile(r"leaderboard/(data/|protocols/.*\.yaml)")  # the text of protocols is locked
PHRASES = [
    (
        r"\b(that|those) of (that|those)\b",
        "the loss is that of those steps",
        "repeat the noun: the loss of these steps",
    ),
    (r"\bof which there\b", "layers, of which there are nine", "nine layers"),
    (r"\b(gives?|gave|given) back\b", "gives back the images", "returns the images"),
    (r"\bno more than one that\b", "no more than one that fires", "at most one that fires"),
    (r"\bis the \w+ alone that\b", "it is the solver alone that changes", "only the solver changes"),
    (
        r"\b(therein|thereof|whereof|whereby|wherein|thereupon)\b",
        "the file and the keys therein",
        "the keys in the file",
    ),
    (r"\b(of one and the same|in its stead|in want of)\b", "runs in its stead", "runs instead"),
    (r"\b(upon|unto|whilst|amongst)\b", "upon a stop", "on a stop"),
    (r"[\w`] alone\b(?! (on|in)|\()", "the sampler alone may change", "only the sampler may change"),
    (r"(?<![Tt]here )\b(is|are) none\b", "a result without one is none", "every result has one"),
    (
        r"(?<![Tt]here )\b(is|are|was|were) no (?!longer|more|less|fewer)[a-z]",
        "the file is no checkpoint",
        "the file is not a checkpoint",
    ),
    (r"\b(go|goes|going|went|gone) on\b", "sampling goes on without graphs", "sampling continues without graphs"),
    (r"\bsummands?\b", "factor and summand of a norm", "scale and shift of a norm"),
    (r"\b(whatever else|no business of|if need be|somebody else|once and for all)\b", "or somebody else", "or others"),
    (r"\bWhether to\.", "enabled: Whether to.", "enabled: Train through CUDA graphs."),
]
"""Pattern, a sentence that has it, and a better one."""


def test_no_tracked_file_has_an_awkward_phrase() -> None:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if not name.endswith(SUFFIXES) or name in QUOTED or DATA.match(name) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, _, better in PHRASES:
                if match := re.search(pattern, line):
                    found.append(f"{name}:{number}: {match[0]!r}; better, for example: {better}")
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(("pattern", "example", "better"), PHRASES)
def test_phrase_is_found_in_its_example_and_not_in_the_better_one(pattern: str, example: str, better: str) -> None:
    assert re.search(pattern, example)
    assert not re.search(pattern, better)
