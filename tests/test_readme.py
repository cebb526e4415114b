"""Every command in the Markdown files parses, every relative link leads somewhere, and the README stays short."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from benchmark.cli import COMMANDS, PASS_THROUGH, STAGES, main
from benchmark.configs import find_config
from benchmark.stages import BenchmarkCLI, run_stage
from benchmark.studies import read_study

FOLDERS = (".github", "benchmark", "configs", "datamodules", "leaderboard", "systems", "tests")
PAGES = sorted([*Path().glob("*.md"), *(page for folder in FOLDERS for page in Path(folder).rglob("*.md"))])
RESULTS = Path("leaderboard/RESULTS.md")
MOST_LINES = 150
QUICKSTART = "configs/quickstart.yaml"
PLACEHOLDER_CONFIG = r"C|runs/[A-Z_]+/config\.yaml"
PASSED_TO = {"sweep-threshold": "test", "sweep-solvers": "test", "relay": "fit", "regress": "fit", "ablate-sdit": "fit"}
"""Commands that pass the options they do not know to a stage."""


class ParsedError(Exception):
    """Ends a command once its options are parsed."""


class ParserOnly(BenchmarkCLI):
    """Builds the parser of a stage and stops."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise ParsedError(parser)


@cache
def stage_parser(stage: str) -> Any:
    with pytest.raises(ParsedError) as stop:
        run_stage([stage, "--help"], ParserOnly)
    return stop.value.args[0]


def commands(page: str) -> Iterator[list[list[str]]]:
    """Yields the arguments of the suite's commands, those of one code block together."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.M | re.S)
    spans = re.findall(r"`(python -m benchmark[^`]*)`", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S))
    for block in [*blocks, *spans]:
        text = block.replace("\\\n", " ")
        for name, items in re.findall(r"^(\w+)=\((.*)\)$", text, re.M):
            text = text.replace(f'"${{{name}[@]}}"', items)
        found = []
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer) if "-m benchmark" in line else []
            for start, word in enumerate(words[1:], 1):
                if word == "benchmark" and words[start - 1] == "-m":
                    rest = words[start + 1 :]
                    end = next((i for i, text in enumerate(rest) if set(text) <= set("|&;<>")), len(rest))
                    found.append(rest[:end])
        yield found


def check_block(block: list[list[str]]) -> None:
    """Parses the commands of a block; without `--config` they are about the run of the last `fit` before them."""
    run = QUICKSTART
    for args in block:
        run = check(args, run)


def check(args: list[str], run: str) -> str:
    """Parses one command, and returns the configuration of the newest run after it."""
    if not args or args[0] in ("-h", "--help", "--version"):
        return run
    name = " ".join(args[:2]) if " ".join(args[:2]) in COMMANDS else args[0]
    rest = args[len(name.split()) :]
    if {"-h", "--help"} & set(rest):
        assert name in STAGES | COMMANDS | PASS_THROUGH, f"unknown command {name}"
        return run
    if name in STAGES:
        return check_stage(name, rest, run, follows=name != "fit" or "--ckpt_path" in rest)
    if name in COMMANDS:
        parsed(args, jsonargparse.ArgumentParser, "parse_args")
        return run
    assert name in PASS_THROUGH, f"unknown command {name}"
    ((options, rest),) = parsed(args, argparse.ArgumentParser, "parse_known_args")
    if name == "matrix":
        assert not rest, rest
        if "design" in options:
            assert read_study(find_config(options.design)).methods
            return run
        config = options.configs / f"{options.methods[0]}_{options.datasets[0]}.yaml"
        return check_stage("fit", [f"--{item}" for item in options.set], str(config))
    config = {"regress": "configs/regress/sddpm.yaml", "ablate-sdit": str(getattr(options, "config", ""))}
    return check_stage(PASSED_TO[name], rest, config.get(name, run), follows=name != "relay")


def check_stage(stage: str, rest: list[str], run: str, follows: bool = True) -> str:
    rest = [word for word in rest if word != "--draft"]  # `run_stage` spells it out
    rest = [run if re.fullmatch(PLACEHOLDER_CONFIG, word) else word for word in rest]
    if "--config" not in rest and follows:
        rest = ["--config", run, *rest]
    if stage != "fit" and "--ckpt_path" not in rest:
        rest += ["--ckpt_path", "last"]
    stage_parser(stage).parse_args([stage.replace("-", "_"), *rest], defaults=False)  # a quarter of the time
    return rest[rest.index("--config") + 1] if "--config" in rest else run


def parsed(args: list[str], parser: type[argparse.ArgumentParser], method: str) -> tuple[Any, ...]:
    """Runs a command until a method of its parser has parsed its options; returns what this method returned."""
    parse = getattr(parser, method)

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise ParsedError(parse(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, method, stop)
        with pytest.raises(ParsedError) as result:
            main(args)
    return result.value.args


def anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub makes for the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\\", "", heading).lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, page: str) -> list[str]:
    """Returns the relative links of a page that lead to no file or to no heading."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:|\.\./\.\./actions/", target):  # elsewhere, or GitHub's pages of the workflows
            continue
        linked = path.parent / file
        found = not file or linked.exists()
        if found and anchor:
            found = anchor in anchors(linked.read_text() if file else page)
        broken += [] if found else [target]
    return broken


@pytest.mark.parametrize("path", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_commands_parse(path: Path) -> None:
    for block in commands(path.read_text()):
        check_block(block)


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text()) == []


def test_readme_is_short() -> None:
    assert len(Path("README.md").read_text().splitlines()) <= MOST_LINES


def test_table_of_the_readme_is_part_of_the_rendered_results() -> None:
    """Rows are found by method, solver and NFE, columns by their headers."""
    rendered = rows(RESULTS.read_text().split("## mnist, offline-v2")[1].replace("\\", ""))
    shown = rows(Path("README.md").read_text().split("## Results")[1])
    assert len(shown) > 4
    for row in shown:
        (match,) = [r for r in rendered if r["Method"] == row["Method"] and r["Solver"] == row["Solver"]]
        assert row.items() <= match.items()


def rows(text: str) -> list[dict[str, str]]:
    """Returns the rows of the first table in a text; headers without what stands before their unit."""
    table = re.search(r"(?:^\|.*\|\n)+", text, re.M)
    assert table
    header, _, *lines = [[cell.strip(" `*") for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return [dict(zip([name.split(", ")[-1] for name in header], line, strict=True)) for line in lines]


@pytest.mark.parametrize(
    "line",
    [
        "fit --config configs/quickstart.yaml --model.base_chanels 8",
        "fit --config configs/quickstart.yaml --model.base_channels eight",
        "fit --config configs/no_such_file.yaml",
        "test --modle.threshold 1",
        "test --model.temperature 0.6",
        "tset",
        "leaderboard render --outptu FOLDER",
        "regress --method sddpm",
        "matrix --methods sddpm --datasets mnist --sed 1",
        "matrix --design configs/track/design.yaml --stages train",
        "matrix --methods sddpm --datasets mnist --set trainer.maxsteps=1",
        "sweep-solvers --nfe ten",
        "ablate-sdit --model.recnstruction false",
    ],
)
def test_mistyped_command_is_found(line: str) -> None:
    (block,) = commands(f"```bash\npython -m benchmark {line}   # comment\n```\n")
    with pytest.raises((SystemExit, AssertionError)):
        check_block(block)


def test_commands_are_found_in_blocks_arrays_pipes_and_text() -> None:
    page = """Run `python -m benchmark regress` first.
```bash
runs=(--methods sddpm --seeds 0 1)
FOO=1 torchrun -m benchmark fit --config C \\
    --data.root D
python -m benchmark matrix "${runs[@]}" --print | sh -c    # comment
python -m pytest
```
"""
    block, span = commands(page)
    assert block == [
        ["fit", "--config", "C", "--data.root", "D"],
        ["matrix", "--methods", "sddpm", "--seeds", "0", "1", "--print"],
    ]
    assert span == [["regress"]]


def test_options_of_a_test_are_those_of_the_run_before() -> None:
    fit = ["fit", "--config", "configs/spiking_diffusion_mnist.yaml", "--data.root", "D"]
    check_block([fit, ["test", "--model.temperature", "0.6"]])


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("README.md", False),
        ("README.md#results", False),
        ("#here-too", False),
        ("https://example.org/nowhere", False),
        ("NO.md", True),
        ("README.md#no-such-heading", True),
        ("#nowhere", True),
    ],
)
def test_broken_link_is_found(link: str, is_broken: bool) -> None:
    page = f'## Here, *too*\n[text]({link}) <img src="{link}">\n'
    assert broken_links(Path("PAGE.md"), page) == [link, link] * is_broken
