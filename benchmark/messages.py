"""Error messages in one line."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

NOISE = (
    "Does not validate against any",
    "- Does not validate against any",
    "- Expected a path but",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "- Expected a <class 'collections.abc.Iterable'>",
    "Given value type:",
)
"""Beginnings of lines that are left out."""
MAX_VALUE_LENGTH = 100
"""Characters above which the given value, possibly a whole config, is left out."""


def condense(message: str) -> str:
    """Joins a parser's message to one line, without the types it tried and without long values."""
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE)]
    return " ".join(line for line in kept if not (line.startswith("Given value:") and len(line) > MAX_VALUE_LENGTH))


SUITE = tuple(Path(__file__).parents[1] / name for name in ("benchmark", "datamodules", "leaderboard", "systems"))
"""Folders of the suite's code."""
INSTALLED = ("site-packages", "dist-packages")
"""Names of folders of installed code."""


def _is_own(file: str) -> bool:
    """Whether a file of a traceback is neither the suite's nor installed, nor made by a compiler."""
    path = Path(file)
    library = Path(sysconfig.get_path("stdlib"))
    return (
        not file.startswith("<")  # such as <frozen importlib._bootstrap>
        and not any(part in INSTALLED or part.startswith("torchinductor_") for part in path.parts)
        and not any(path.is_relative_to(folder) for folder in (*SUITE, library))
    )


def from_own_code(error: BaseException | None) -> str:
    """Returns the error that a module of the user's own raised, with file and line; empty if none did.

    Args:
        error: The error that ended the command; those that led to it are searched, too.
    """
    while error is not None:
        text = str(error)
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename is not None:
            text, places = error.msg, [(error.filename, error.lineno)]
        if own := [place for place in places if _is_own(place[0])]:
            return f"{type(error).__name__}: {text} ({own[-1][0]}, line {own[-1][1]})"
        error = error.__cause__ or error.__context__
    return ""


EXAMPLES = {
    "Optimizer": "torch.optim.Adam",
    "LRScheduler": "torch.optim.lr_scheduler.CosineAnnealingLR",
    "SchedulerMixin": "DDIMScheduler",
    "Logger": "CSVLogger",
    "Callback": "EMAWeightAveraging",
}
"""Base classes of options, and a class that can be given."""

HINTS = {("neuron", "relu"): "ReLU twins exist of SDDPM, SDM and FSDDIM"}
"""What to do about values that some classes accept, by option and value."""


def explain_nested(message: str) -> str | None:
    """Returns what is wrong with an option of a class, such as `--model.optimizer.lr 0.01` without the class.

    Args:
        message: Condensed message of the parser.

    Returns:
        One sentence, or None if the message is about something else.
    """
    nested = re.findall(r"NestedArg\(key='([^']*)', val=('[^']*'|[^)]*)\)", message)
    root = re.search(r'Parser key "([^"]+)"', message)
    classes = re.findall(r"class_path='([^']+)'|given class_path '([^']+)'|but (\S+) is abstract", message)
    if not nested or root is None or not classes:
        return None
    key, value = nested[-1][0], nested[-1][1].strip("'")
    option = f"--{root[1]}.{key}"
    parent = option.rpartition(".")[0].removesuffix(".init_args")
    found = "".join(classes[-1])
    if example := EXAMPLES.get(found.rpartition(".")[2]):
        sign = "+=" if parent.endswith("callbacks") else " "
        return f"{option} needs the class that has this option, for example: {parent}{sign}{example} {option} {value}"
    if "is not accepted" in message:
        return f"{option}: {found} has no option {key.rpartition('.')[2]!r}"
    expected = re.findall(r"Expected an? <class '([^']+)'>", message)
    remedy = HINTS.get((key, value), f"expected {expected[-1]}" if expected else "")
    return f"{option}={value}: not a value that {found} accepts{'; ' * bool(remedy)}{remedy}"
