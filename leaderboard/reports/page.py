"""The leaderboard as one self-contained HTML page: no network requests, readable without JavaScript."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jinja2
from markupsafe import Markup

from leaderboard.energy import ARITHMETIC, read_models
from leaderboard.record.entries import STATUSES
from leaderboard.record.records import Record
from leaderboard.reports.boards import MEANINGS, UNKNOWN, Board, measured_boards, published_boards
from leaderboard.reports.energies import ALL_MODELS, ENERGY, energy_label
from leaderboard.reports.energy_plots import ALL
from leaderboard.reports.published import Published


def render_page(records: Iterable[tuple[Path, Record]], published: Published) -> str:
    """Returns the page as HTML; the same records, pictures and published numbers give the same bytes."""
    boards = measured_boards(records) + published_boards(published)
    rows = [row for board in boards for row in board.rows]
    counts = Counter({b.dataset: 0 for b in boards})
    counts.update(b.dataset for b in boards if b.source == "measured" for row in b.rows if row.source == "measured")
    names = sorted(counts, key=lambda name: (-counts[name], name))  # most results first
    by_models = [row for row in rows if row.source != "known"]
    methods = {row.method_key: row.method for row in by_models}  # the spelling of published results takes precedence
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html.jinja").render(
        datasets={name: [b for b in boards if b.dataset == name] for name in names},
        rows=rows,
        methods=sorted(methods.items(), key=lambda item: item[1].casefold()),
        meanings=MEANINGS,
        unknown=UNKNOWN,
        unranked=[status for status in STATUSES if status != "measured"],
        energies=_energies(boards),
        energy_column=ENERGY,
        energy_labels={name: energy_label(model) for name, model in read_models().items()},
        all_models=ALL,
        arithmetic=ARITHMETIC,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_csp_hash(style)}; script-src {_csp_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def _energies(boards: Iterable[Board]) -> list[str]:
    """Returns what the selector of energy offers, the default first: all models, and each model of any result."""
    measured = [board for board in boards if board.source == "measured"]
    bands = (
        [ALL] if any(ALL in board.plots or ALL_MODELS in row.cells for board in measured for row in board.rows) else []
    )
    found = {
        name for board in measured for row in board.rows for name, c in row.energies.items() if c.value is not None
    }
    return bands + [name for name in read_models() if name in found or name == ARITHMETIC]


def _csp_hash(text: str) -> str:
    """Returns the Content-Security-Policy source that allows only this inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
