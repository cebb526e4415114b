from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.cli import main
from benchmark.commands.sweeps import SOLVERS
from benchmark.commands.verify import verify
from benchmark.runs import newest_run
from leaderboard.record.entries import Entry
from leaderboard.record.records import MetricValue, Record, find_records, read_record, redact_paths
from leaderboard.record.repetition import agree


@pytest.fixture(scope="module")
def tested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one record, of a solver with an infinite option."""
    runs = shutil.copytree(trained, tmp_path_factory.mktemp("tested") / "runs")
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", *SOLVERS["dpm-solver++"].options])
    return newest_run(runs)


@pytest.fixture
def record(tested: Path) -> Path:
    (path,) = find_records([tested])
    return path


@pytest.fixture
def repeated(record: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the repetition: records its arguments and returns the original record."""
    asked: list[dict[str, Any]] = []

    def repeat(settings: dict[str, Any], checkpoint: Path, folder: Path) -> Record:
        asked.append(settings | {"checkpoint": checkpoint, "folder": folder})
        return read_record(record)

    monkeypatch.setattr("benchmark.commands.verify._repeat", repeat)
    return asked


def edited(record: Path, folder: Path, **fields: Any) -> Path:
    """Writes a record with other fields; the run folder is no longer beside it."""
    path = folder / "edited.json"
    path.write_text(json.dumps(json.loads(record.read_text()) | fields))
    return path


def test_repetition_agrees_and_leaves_the_run_alone(
    tested: Path, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tested.rglob("*")}
    main(["leaderboard", "verify", str(record), f"--output={tmp_path}"])
    shown = capsys.readouterr().out
    assert "verified: " in shown
    assert " no " not in shown.split("metrics, to agree within the recorded uncertainty")[1]
    assert {path: path.stat().st_mtime_ns for path in tested.rglob("*")} == before
    (new,) = find_records([tmp_path])
    assert new.parent == tmp_path / record.stem / "records"
    assert read_record(new).metrics == read_record(record).metrics  # on the same device to the last digit


@pytest.fixture
def copied(record: Path, tmp_path: Path) -> list[str]:
    """Arguments that verify a copy of the record in a folder of its own."""
    folder = tmp_path / "records"
    folder.mkdir()
    checkpoint = next((record.parent.parent / "checkpoints").glob("last.ckpt"))
    return ["leaderboard", "verify", shutil.copy(record, folder), f"--checkpoint={checkpoint}"]


@pytest.mark.usefixtures("repeated")
def test_a_kept_repetition_marks_the_row_as_repeated(
    record: Path, copied: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "repetitions" / record.name
    main(copied)
    assert not kept.exists()
    main([*copied, "--keep=true"])
    assert read_record(kept) == redact_paths(read_record(record))
    capsys.readouterr()
    main(["leaderboard", f"--records=[{tmp_path}]", "--wide"])
    assert read_record(record).created[:10] in capsys.readouterr().out


@pytest.mark.usefixtures("repeated")
def test_a_repetition_by_others_marks_the_row_as_verified(record: Path, copied: list[str], tmp_path: Path) -> None:
    main([*copied, "--keep=true", "--by=Third Party"])
    kept = tmp_path / "repetitions" / "Third Party" / record.name
    assert read_record(kept) == redact_paths(read_record(record))
    entry = Entry(tmp_path / "records" / record.name, read_record(record))
    assert entry.repeated is None
    assert list(entry.verified) == ["Third Party"]
    assert find_records([tmp_path]) == [entry.path]  # a repetition is not a record of its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep=true", "--by=../x"], "--by '../x' is not a suitable name"),
        (["--keep=true", "--by=Records"], "--by 'Records' is not a suitable name"),
        (["--by=Third Party"], "nothing is kept: add --keep true"),
    ],
)
@pytest.mark.usefixtures("repeated")
def test_an_unsuitable_name_is_refused(
    copied: list[str], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*copied, *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "repetitions").exists()


def test_a_repetition_that_does_not_agree_is_not_kept(
    record: Path, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(read_record(record), nfe=1)
    monkeypatch.setattr("benchmark.commands.verify._repeat", lambda *_: other)
    with pytest.raises(SystemExit):
        main([*copied, "--keep=true"])
    assert not (tmp_path / "repetitions").exists()


@pytest.mark.usefixtures("repeated")
def test_what_does_not_agree_is_shown(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(record.read_text())
    data["metrics"]["fd_digits"]["value"] -= 2 * data["metrics"]["fd_digits"]["uncertainty"]
    data["cost"]["energy_strict_mj"] *= 0.9
    data["code"]["versions"]["torch"] = "1.0"
    data["dataset"]["fingerprint"] = "e" * 64
    with pytest.raises(SystemExit) as stop:
        verify(str(edited(record, tmp_path, **data)), str(record.parents[1] / "checkpoints" / "last.ckpt"))
    assert stop.value.code == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {row[0]: row[-1] for row in rows if row and row[-1] in ("yes", "no")}
    assert verdicts["fd_digits"] == verdicts["energy_strict_mj"] == "no"
    assert verdicts["kd_digits"] == verdicts["sops"] == "yes"
    assert any(row[:4] == ["version", "of", "torch", "1.0"] for row in rows)
    assert any(row[:2] == ["data", "fingerprint"] for row in rows)
    assert any(row[:1] == ["failed:"] for row in rows)


def test_another_checkpoint_fails_at_once(
    record: Path, repeated: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered = tmp_path / "last.ckpt"
    content = bytearray((record.parents[1] / "checkpoints" / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    tampered.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        verify(str(record), str(tampered))
    assert stop.value.code == 1
    assert "is not the checkpoint of" in " ".join(capsys.readouterr().out.split())
    assert repeated == []


def test_checkpoint_is_found_by_its_hash(
    tested: Path, record: Path, repeated: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tested.parents[1])
    config = json.loads(record.read_text())["config"] | {"ckpt_path": "gone.ckpt"}
    moved = edited(record, tmp_path, config=config, config_sha256=_hash(config))
    verify(str(moved))
    assert repeated[0]["checkpoint"] == Path("runs") / tested.name / "checkpoints" / "last.ckpt"
    assert repeated[0]["folder"] == Path("verifications") / "edited"


def _hash(config: Any) -> str:
    from leaderboard.files import canonical_sha256

    return canonical_sha256(config)


def test_missing_checkpoint_is_named_by_its_hash(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hashed = {"name": "last.ckpt", "sha256": "c" * 64}
    for fields, message in (
        (
            {"checkpoint": hashed},
            f"SHA-256 {'c' * 64} is neither in its run folder nor under runs/ nor in the zoo; add",
        ),
        ({"checkpoint": None}, "names no checkpoint, as it was measured right after training; add --checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            verify(str(edited(record, tmp_path, **fields)))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_file_that_the_record_does_not_place_is_asked_for(
    record: Path, repeated: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = record.read_text()
    assert str(tmp_path.parent) not in text  # nothing of this machine
    config = json.loads(text)["config"]
    assert config["ckpt_path"] == ".../last.ckpt"
    config["data"]["init_args"]["root"] = ".../mnist"
    config["evaluation"]["fad_dir"] = ".../fad"
    config["model"]["init_args"]["scheduler"]["init_args"]["gamma"] = ".../gamma.npy"
    path = edited(record, tmp_path, config=config, config_sha256=_hash(config))
    given = {"checkpoint": str(record.parents[1] / "checkpoints" / "last.ckpt")}
    for option, name in (("root", "mnist"), ("fad_dir", "fad"), ("gamma", "gamma.npy")):
        with pytest.raises(SystemExit) as stop:
            verify(str(path), **given)
        assert stop.value.code == 2
        assert f"it does not contain the path of .../{name}; add --{option} PATH" in capsys.readouterr().err
        given[option] = f"here/{name}"
    verify(str(path), **given)
    (settings,) = repeated
    assert settings["data"]["init_args"]["root"] == "here/mnist"
    assert settings["evaluation"]["fad_dir"] == "here/fad"
    assert settings["model"]["init_args"]["scheduler"]["init_args"]["gamma"] == "here/gamma.npy"


def test_only_what_a_result_depends_on_is_repeated(record: Path, repeated: list[Any]) -> None:
    verify(str(record), root="elsewhere", accelerator="cpu", inception_weights="pt.pth")
    (settings,) = repeated
    assert settings["data"]["init_args"]["root"] == "elsewhere"
    assert "cache_dir" not in settings["data"]["init_args"]
    assert settings["evaluation"]["inception_weights"] == "pt.pth"
    assert settings["evaluation"]["protocol"] == "offline-v1"
    assert settings["seed_everything"] == 42
    assert settings["trainer"]["devices"] == 1
    assert not {"callbacks", "plugins", "logger", "strategy", "profiler"} & settings["trainer"].keys()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"{}", [], "field checkpoint: the field is missing"),
        (None, ["--checkpoint=nowhere.ckpt"], "--checkpoint nowhere.ckpt is not a file"),
        (None, ["--root=elsewhere"], "does not accept its config"),
    ],
)
def test_what_cannot_be_verified_is_no_failure(
    record: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    options: list[str],
    message: str,
) -> None:
    file = record
    if content is not None:
        file = tmp_path / "broken.json"
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["leaderboard", "verify", str(file), f"--output={tmp_path / 'out'}", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "uncertainty", "repeated", "samples", "expected"),
    [
        (1.0, 0.1, 1.09, 10, True),
        (1.0, 0.1, 1.11, 10, False),
        (1.0, 0.1, 1.0, 11, False),
        (1.0, 0.0, 1.0 + 1e-7, 10, True),
        (1.0, 0.0, 1.0 + 1e-5, 10, False),
        (-1.0, -5.0, -1.0, 10, True),
    ],
)
def test_rule(value: float, uncertainty: float, repeated: float, samples: int, expected: bool) -> None:
    recorded = MetricValue(value, uncertainty, 10)
    assert agree(recorded, MetricValue(repeated, 9.0, samples)) is expected
    assert not agree(recorded, None)
    assert agree(replace(recorded), recorded)
