"""Section of `RESULTS.md` on a study: learning curves, the price of longer chains, answers to its questions, samples.

Where methods were measured on two datasets, a table compares their order.

`python -m benchmark matrix --design` writes the results of a study to a folder: `search/*.json`, `trainings/*.json`,
which name their records, and `records/` with the measurements that are not ranked. `questions.yaml` beside them names
the pairs of methods that the section compares.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image
from scipy.stats import kendalltau, rankdata

from leaderboard.energy import read_models
from leaderboard.pictures import GRID_COLUMNS, excerpt
from leaderboard.record.entries import Entry, headline, table_metrics
from leaderboard.record.records import find_records, read_record, redact_paths
from leaderboard.reports.break_even_report import compared, rates_in_words
from leaderboard.reports.cells import metric_cell, number_cell
from leaderboard.reports.colours import colour, marks
from leaderboard.reports.energies import all_models, band_cell, energy
from leaderboard.reports.methods import Method
from leaderboard.reports.statistics import LEVEL, OF_AN_EVALUATION, difference, half_width, holm
from leaderboard.reports.table import escape, markdown_line

FOLDER = "curves"
"""Folder of the studies, one subfolder each; it lies beside the folder of records."""
QUESTIONS = "questions.yaml"
"""File with the questions of a study."""
GRID_ROWS = 3
"""Rows of images of each method in the figure of samples."""
INTRODUCTION = """\
All methods saw the same number of images and have about the same number of parameters. The
[design](../configs/track/README.md), {sha256}, was committed before the first run. mJ is 45 nm arithmetic per image,
"all models" the lowest to the highest model of energy."""
CURVE_NOTE = """\
Earlier points are drafts of one seed. The last one is the mean over all seeds in the table; in the figure it is of
the same seed as the others. "CPU h" is the time of the first seed's training, since later seeds may have run on
another machine. "Training, J" is the arithmetic of the forward passes of a training, a lower bound of its energy. The
search chose averaged or plain weights, and every point is measured with its choice. Compare the shapes of curves only
between the same kind of weights: averaging helps while the learning rate is high, but the first point is too high,
because the average still contains the first steps of training."""
ANSWER_NOTE = """\
Means over the seeds that A and B share. p is corrected for all {pairs} planned pairs. All seeds of a method draw the
same noise, so neither p nor the interval contains the variation of that draw."""
BREAK_EVEN_NOTE = """\
The firing rate below which the spiking network costs less, for each model of energy. Where a model has a lower and an
upper bound, there are two rates."""
CHAIN_NOTE = "Chains of the same trainings. Longer chains than the ranked one are drafts."
ORDER_NOTE = """\
Ranks of the methods measured on both datasets, of the seeds that both share, 1 the lowest distance. Kendall's tau is 1
for the same order, 0 for unrelated orders and -1 for the opposite one. It does not know how far the seeds of a method
lie apart."""
SEARCH_NOTE = """\
Validation loss of the last weights / of averaged weights. It chooses among the settings of one method; losses of
different methods are not comparable."""
Styles = Mapping[str, dict[str, Any]]
"""Options of matplotlib for each method of a study."""
STAGES_METRIC = "reconstruction_mse"
"""Metric of methods with an autoencoder, whose stages are trained in turn."""


@dataclass(frozen=True)
class Training:
    """One training of a study whose last weights were measured.

    Args:
        images: Images seen.
        cpu_seconds: CPU time.
        averaged: Whether its weights are averaged.
        final: Ranked record of its last weights.
        curve: Records of earlier weights, by images seen.
        others: Records of the last weights with other options, such as more network evaluations.
    """

    images: int
    cpu_seconds: float
    averaged: bool
    final: Entry
    curve: Mapping[int, Entry]
    others: Sequence[Entry]


@dataclass(frozen=True)
class Member:
    """Trainings of one method on one dataset with several seeds.

    Args:
        key: Name of the method in the design.
        dataset: Name of the dataset in the design.
        trainings: One for each seed, in their order.
    """

    key: str
    dataset: str
    trainings: tuple[Training, ...]

    @cached_property
    def method(self) -> Method:
        """The last weights of all seeds."""
        return _last(self.trainings)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.trainings[0].images

    @property
    def is_averaged(self) -> bool:
        """Whether the weights are averaged."""
        return self.trainings[0].averaged

    @property
    def cpu_hours(self) -> float:
        """CPU time of the first seed's training in hours; other seeds may have run on another machine."""
        return self.trainings[0].cpu_seconds / 3600

    @property
    def training_joules(self) -> float | None:
        """Lower bound of the energy of training: its forward passes, by 45 nm arithmetic.

        None for a method whose stages train different networks, since a step of its chain runs only one of them.
        """
        per_image, nfe = self.method.mean_cost("energy_strict_mj"), self.method.record.nfe
        if per_image is None or nfe is None or STAGES_METRIC in self.method.record.metrics:
            return None
        return per_image / nfe * self.images / 1000

    @cached_property
    def curve(self) -> dict[int, Method]:
        """Quality by images seen, of the seeds whose earlier weights were measured; of the first seed if none were."""
        measured = [training for training in self.trainings if training.curve] or self.trainings[:1]
        counts = sorted({count for training in measured for count in training.curve})
        points = {n: Method(tuple(t.curve[n] for t in measured if n in t.curve)) for n in counts}
        return points | {self.images: _last(measured)}

    @cached_property
    def chains(self) -> list[Method]:
        """Chains of several lengths, of the seeds that were measured with longer ones; empty if none were."""
        measured = [training for training in self.trainings if training.others]
        chains: dict[tuple[int, str, str], list[Entry]] = {}
        for training in measured:
            for entry in (training.final, *training.others):
                key = entry.record.nfe or 0, entry.record.solver or "", entry.status
                chains.setdefault(key, []).append(entry)
        return [Method(tuple(chains[key])) for key in sorted(chains)]


def _last(trainings: Iterable[Training]) -> Method:
    return Method(tuple(training.final for training in trainings))


@dataclass(frozen=True)
class Results:
    """What was found in a study so far.

    Args:
        name: Name of the design.
        sha256: Hash of the design.
        searches: Content of the search of each method.
        members: Methods with measured trainings, by dataset and quality.
        questions: Questions with a pair of methods for each.
    """

    name: str
    sha256: str
    searches: dict[str, Any]
    members: tuple[Member, ...]
    questions: tuple[tuple[str, str, str], ...]

    def by_dataset(self) -> dict[str, list[Member]]:
        """Returns the methods of each dataset, the best first."""
        ordered = sorted(self.members, key=lambda member: member.method.frechet)
        names = [member.dataset for member in ordered]
        return {
            name: [member for member in ordered if member.dataset == name]
            for name in sorted(set(names), key=lambda name: (-names.count(name), name))
        }


def find_studies(folders: Iterable[str | Path]) -> list[Path]:
    """Returns the folders of studies within or beside folders of records."""
    places = {place / FOLDER for folder in map(Path, folders) for place in (folder, folder.parent)}
    return sorted(path for place in places for path in place.glob("*") if _trainings(path))


def _trainings(folder: Path) -> list[Path]:
    return sorted(folder.glob("trainings/*.json"))


def read_results(folder: Path) -> Results:
    """Reads what was found in a study.

    Args:
        folder: Folder of the study; the records that its trainings name lie below the folder that contains `curves`.

    Raises:
        FileNotFoundError: If a training names a record that is not there.
    """
    files = {path.name: path for path in find_records([folder.parents[1]])}
    found: dict[tuple[str, str], list[Training]] = {}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in _trainings(folder)]
    for content in sorted(contents, key=lambda content: int(content["seed"])):
        if missing := sorted(set(content["records"].values()) - files.keys()):
            raise FileNotFoundError(
                f"{folder}: the training of {content['method']} with seed {content['seed']} names the record "
                f"{missing[0]}, which is not below {folder.parents[1]}; copy it there"
            )
        if (training := _training(content, files)) is not None:
            found.setdefault((content["method"], content["dataset"]), []).append(training)
    questions = folder / QUESTIONS
    groups = yaml.safe_load(questions.read_text(encoding="utf-8")) if questions.is_file() else []
    return Results(
        contents[0]["design"]["name"],
        contents[0]["design"]["sha256"],
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("search/*.json"))},
        tuple(Member(key, dataset, tuple(trainings)) for (key, dataset), trainings in found.items()),
        tuple((group["question"], a, b) for group in groups for a, b in group["pairs"]),
    )


def _training(content: dict[str, Any], files: Mapping[str, Path]) -> Training | None:
    """Returns a training with its records; None if its last weights have no ranked record."""
    steps = max(map(int, content["checkpoints"]))
    final, others, curve = None, [], {}
    for key, name in content["records"].items():
        entry, measured = Entry(files[name], redact_paths(read_record(files[name]))), int(key.rpartition("-")[2])
        if entry.is_ranked:
            final = entry
        elif measured == steps:
            others.append(entry)
        else:
            curve[content["images"] * measured // steps] = entry
    if final is None:
        return None
    averaged = content["chosen"]["averaged"]
    return Training(content["images"], content["cpu_seconds"], averaged, final, curve, others)


def study_lines(study: Results, save: Callable[[str, Figure], str]) -> list[str]:
    """Returns the section in Markdown.

    Args:
        study: What was found.
        save: Writes a figure under a name and returns the line that shows it.
    """
    lines = ["", f"## Study {study.name}", "", INTRODUCTION.format(sha256=study.sha256[:8])]
    styles = _styles(study.members)
    for dataset, members in study.by_dataset().items():
        quality = headline(members[0].method.record)[0]
        points = _curve_table(members, quality)
        answers = ANSWER_NOTE.format(pairs=len(study.questions))
        for name, title, note, table, figure in (
            ("curves", f"{quality} against images seen", CURVE_NOTE, points, _curves(members, styles)),
            ("quality-energy", f"{quality} against energy", "", [], _energy_figure(members, styles)),
            ("answers", "Answers", answers, _answer_table(study.questions, members, quality), None),
            ("break-even", "Break-even", BREAK_EVEN_NOTE, _break_even_table(study.questions, members), None),
            ("chains", "More network evaluations", CHAIN_NOTE, _chain_table(members, quality), None),
            ("samples", "Samples", "", [], sample_figure(members)),
        ):
            has_rows = len(table) > HEADER
            if has_rows or figure is not None:
                lines += ["", f"### {dataset}: {escape(title)}"]
                lines += ["", note] if note else []
            lines += ["", *table] if has_rows else []
            lines += ["", save(f"{study.name}-{name}-{dataset}", figure)] if figure is not None else []
    first, *others = study.by_dataset().values()
    for other in others:
        if len(table := _order_table(first, other)) > HEADER:
            title = f"### Order on {first[0].dataset} and {other[0].dataset}"
            lines += ["", title, "", ORDER_NOTE, "", *table]
    title = "### Search of learning rate and averaging"
    return [*lines, "", title, "", SEARCH_NOTE, "", *_search_table(study.searches)]


HEADER = 2
"""Lines of the header of a table."""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [markdown_line(header), markdown_line("---" for _ in header), *map(markdown_line, rows)]


def _curve_table(members: Sequence[Member], quality: str) -> list[str]:
    """Returns quality by images seen, with the price of training."""
    counts = sorted({count for member in members for count in member.curve})
    header = ["Method", *(f"{count:,} images" for count in counts), "Weights", "Seeds", "CPU h", "Training, J"]
    rows = []
    for member in members:
        points = member.curve | {member.images: member.method}
        cells = [str(metric_cell(quality, points[n])) if n in points else "-" for n in counts]
        price = (number_cell(value).text for value in (member.cpu_hours, member.training_joules))
        weights = "averaged" if member.is_averaged else "plain"
        rows.append([member.method.name, *cells, weights, str(len(member.trainings)), *price])
    return _table(header, rows)


def _chain_table(members: Sequence[Member], quality: str) -> list[str]:
    """Returns quality and energy by network evaluations, for the methods with several numbers of them."""
    rows = []
    for member in members:
        for method in member.chains:
            arithmetic = number_cell(method.mean_cost("energy_strict_mj")).text
            band = band_cell(all_models(method)).text
            sampler = f"{method.record.solver}, {method.record.nfe}"
            rows.append([method.name, sampler, str(metric_cell(quality, method)), arithmetic, band])
    return _table(["Method", "Solver, NFE", quality, "mJ", "mJ, all models"], rows)


def _answer_table(questions: Sequence[tuple[str, str, str]], members: Sequence[Member], quality: str) -> list[str]:
    """Returns one line for each pair: quality, test, ratio of energies and what the seeds show."""
    by_key = {member.key: member.method for member in members}
    measured = [(text, *_shared(by_key[a], by_key[b])) for text, a, b in questions if a in by_key and b in by_key]
    pairs = [(text, a, b) for text, a, b in measured if a.entries]
    results = [difference(a.values(quality), b.values(quality)) for _, a, b in pairs]
    tested = [result.p for result in results if result is not None]
    missing = len(questions) - len(tested)
    corrected = iter(holm([*tested, *[1.0] * missing]))  # so that later pairs never withdraw an answer
    rows, last = [], ""
    for (text, a, b), result in zip(pairs, results, strict=True):
        if result is None:
            change, p, answer = f"{b.frechet - a.frechet:+.2f}", "-", "cannot tell: one shared seed"
        else:
            corrected_p = next(corrected)
            change, p = f"{result.value:+.2f} ±{result.half_width:.2f}", f"{corrected_p:.2g}"
            better = a.name if result.value > 0 else b.name
            answer = f"{better} is better" if corrected_p <= LEVEL else "cannot tell"
        rows.append(["" if text == last else text, a.name, b.name, change, p, *_ratios(a, b), answer])
        last = text
    header = ["Question", "A", "B", f"{quality}, B - A", "p, Holm", "mJ, B / A", "all models", "Seeds show"]
    return _table(header, rows)


def _order_table(first: Sequence[Member], other: Sequence[Member]) -> list[str]:
    """Returns the ranks of the methods on two datasets by the Fréchet distances of their own extractors."""
    by_key = {member.key: member.method for member in other}
    shared = [_shared(member.method, by_key[member.key]) for member in first if member.key in by_key]
    pairs = [(a, b) for a, b in shared if a.entries]
    if len(pairs) < 2:
        return []
    columns: dict[str, list[float]] = {}
    taus: list[str] = []
    for key in table_metrics(pairs[0][0].record.metrics):
        counterpart = key.replace(f"_{first[0].dataset}", f"_{other[0].dataset}")
        if key == counterpart or not key.startswith("fd_") or counterpart not in pairs[0][1].record.metrics:
            continue
        x = [statistics.fmean(a.values(key).values()) for a, _ in pairs]
        y = [statistics.fmean(b.values(counterpart).values()) for _, b in pairs]
        columns |= {key: list(rankdata(x)), counterpart: list(rankdata(y))}
        taus += ["", f"{kendalltau(x, y).statistic:.2f}"]
    rows = sorted(zip(*columns.values(), (a.name for a, _ in pairs), strict=True))
    cells = [[name, *(f"{rank:g}" for rank in ranks)] for *ranks, name in rows]
    return _table(["Method", *columns], [*cells, ["Kendall's tau", *taus]]) if columns else []


def _shared(a: Method, b: Method) -> tuple[Method, Method]:
    """Returns two methods with the trainings whose seeds both have."""
    first, second = ({entry.record.seeds["training"]: entry for entry in method.entries} for method in (a, b))
    seeds = [seed for seed in first if seed in second]
    return Method(tuple(first[seed] for seed in seeds)), Method(tuple(second[seed] for seed in seeds))


def _break_even_table(questions: Sequence[tuple[str, str, str]], members: Sequence[Member]) -> list[str]:
    """Returns one line for each pair with and without spikes: the break-even rate by each model of energy."""
    by_key = {member.key: member.method.entries[0] for member in members}
    models, rows = read_models(), []
    for a, b in dict.fromkeys((a, b) for _, a, b in questions if a in by_key and b in by_key):
        costs = [by_key[key].record.counted_cost for key in (a, b)]
        spiking = [cost.firing_rate is not None for cost in costs]
        if sum(spiking) != 1 or any(cost.counts is None for cost in costs):
            continue
        first, second = (by_key[key] for key in ((a, b) if spiking[0] else (b, a)))
        found = {row.model.name: row for row in compared(first, second)[0]}
        names = [Method((entry,)).name for entry in (first, second)]
        rate = f"{first.record.counted_cost.firing_rate or 0.0:.3f}"
        rows.append([*names, rate, *(rates_in_words(found[name]) if name in found else "-" for name in models)])
    titles = (model.title for model in models.values())
    return _table(["With spikes", "Without", "Rate", *titles], rows)


def _ratios(a: Method, b: Method) -> tuple[str, str]:
    """Returns the ratio of energies B / A by 45 nm arithmetic, and its lowest and highest value of all models."""
    first, second = (method.mean_cost("energy_strict_mj") for method in (a, b))
    arithmetic = f"{second / first:.2g}" if first and second else "-"
    bands = [(energy(a, model), energy(b, model)) for model in read_models().values()]
    ratios = [y / x for low, high in bands if low and high for x, y in zip(low, high, strict=True) if x]
    return arithmetic, f"{min(ratios):.2g}-{max(ratios):.2g}" if ratios else "-"


def _search_table(searches: Mapping[str, Any]) -> list[str]:
    """Returns a table of validation losses by learning rate, as `plain / averaged` weights."""
    rates = sorted({entry["learning_rate"] for content in searches.values() for entry in content["tried"]})
    rows = []
    for name, content in searches.items():
        losses = {(entry["learning_rate"], entry["averaged"]): entry["validation_loss"] for entry in content["tried"]}
        cells = [" / ".join(_loss(losses.get((rate, averaged))) for averaged in (False, True)) for rate in rates]
        chosen = content["chosen"]
        edge = ", at the edge" if chosen["learning_rate"] in (rates[0], rates[-1]) else ""
        weights = "averaged" if chosen["averaged"] else "plain"
        rows.append([name, *cells, f"{chosen['learning_rate']:g}, {weights}{edge}"])
    return _table(["Configuration", *(f"{rate:g}" for rate in rates), "Chosen"], rows)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _curves(members: Sequence[Member], styles: Styles) -> Figure | None:
    """Plots quality against images seen, CPU time and energy of training; None if no method has a curve."""
    if all(len(member.curve) == 1 for member in members):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    all_axes = figure.subplots(1, 3, sharey=True)
    titles = ("images seen, thousands", "CPU time of training, hours", "forward passes of training, J")
    for axes, title in zip(all_axes, titles, strict=True):
        for member in members:
            whole = (member.images / 1000, member.cpu_hours, member.training_joules)[titles.index(title)]
            if whole is None:
                continue
            x = [whole * count / member.images for count in member.curve]
            line = {"label": member.method.name, "ls": "-" if member.is_averaged else "--"}
            _draw(axes, x, list(member.curve.values()), **line, **styles[member.key])
        _log_axes(axes)
        axes.set(xlabel=title)
    all_axes[0].set_ylabel(f"{headline(members[0].method.record)[0]} (lower is better)")
    ticks = sorted({count / 1000 for member in members for count in member.curve})
    all_axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    all_axes[0].xaxis.set_minor_locator(NullLocator())
    handles, labels = all_axes[0].get_legend_handles_labels()
    note = "dashed: plain weights" if any(not member.is_averaged for member in members) else None
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, title=note)
    return figure


def _energy_figure(members: Sequence[Member], styles: Styles) -> Figure:
    """Plots quality against energy per image: T of one method joined by lines, longer chains by dots."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    names = {member.method.record.method for member in members}
    for name in sorted(names):  # the same method with other T
        same = sorted(
            (member.method for member in members if member.method.record.method == name),
            key=lambda method: method.record.num_steps or 0,
        )
        if len({method.record.num_steps for method in same}) > 1:
            axes.plot(*zip(*map(_point, same), strict=True), color=colour(name)[0], lw=1, alpha=0.5)
    for member in members:
        style = styles[member.key]
        if member.chains:
            axes.plot(*zip(*map(_point, member.chains), strict=True), color=style["color"], ls=":", lw=1)
        for chain in (member.method, *(chain for chain in member.chains if not chain.is_ranked)):
            if (band := all_models(chain)) is not None:
                axes.hlines(chain.frechet, *band, color=style["color"], alpha=0.35, lw=1)
            label = member.method.name if chain is member.method else None
            _draw(axes, [_point(chain)[0]], [chain], label=label, **style)
    axes.set(xlabel="45 nm arithmetic per image, strict (mJ)\nhorizontal bars: lowest to highest model of energy")
    axes.set(ylabel=f"{headline(members[0].method.record)[0]} (lower is better)")
    _log_axes(axes)
    heights = [chain.frechet for member in members for chain in (member.method, *member.chains)]
    if min(heights) > 0:  # an unbiased estimate can be negative
        axes.set_ylim(min(heights) / 2, max(heights) * 2)  # intervals of few seeds are cut at the frame
    note = "dots: more network evaluations" if any(member.chains for member in members) else None
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title=note)
    return figure


def _point(method: Method) -> tuple[float, float]:
    """Returns the mean energy of an image and the Fréchet distance."""
    return method.mean_cost("energy_strict_mj") or math.nan, method.frechet


def _styles(members: Iterable[Member]) -> Styles:
    """Returns how each method is drawn, the same in every figure of a study."""
    names = {member.key: member.method.record.method for member in sorted(members, key=lambda member: member.key)}
    return dict(zip(names, marks(names.values()), strict=True))


def _draw(axes: Axes, x: Sequence[float], points: Sequence[Method], **style: Any) -> None:
    """Draws points of a method with the 95 % intervals of their quality."""
    heights = [method.frechet for method in points]
    axes.errorbar(x, heights, yerr=[_interval(method) for method in points], ms=5, lw=1.2, capsize=2, **style)


def _log_axes(axes: Axes) -> None:
    """Makes both axes logarithmic, with plain numbers."""
    axes.set(xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 2, 3, 5))):
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _interval(method: Method) -> float:
    key, metric = headline(method.record)
    return half_width(list(method.values(key).values())) or OF_AN_EVALUATION * metric.uncertainty


def sample_figure(members: Sequence[Member]) -> Figure | None:
    """Shows the first images of each method's sample grid beside the nearest training images; None without grids."""
    shown = [entry for member in members if (entry := member.method.entries[0]).samples.is_file()]
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.75 * len(shown)), layout="constrained")
    for row, entry in zip(figure.subplots(len(shown), 2, squeeze=False), shown, strict=True):
        for axes, path in zip(row, (entry.samples, entry.nearest), strict=True):
            axes.set_axis_off()
            if path.is_file():
                with Image.open(path) as page:
                    axes.imshow(excerpt(page, GRID_ROWS, GRID_COLUMNS, entry.record.conditional is not None))
        row[0].set_title(Method((entry,)).name, fontsize=9, loc="left")
        row[1].set_title("nearest training images", fontsize=9, loc="left")
    return figure
