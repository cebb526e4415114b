from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.cli import main
from leaderboard.protocols import OFFLINE_V3
from leaderboard.validation.anchors import anchors, read_anchors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed report of the digits."""
    folder = tmp_path_factory.mktemp("anchors")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **options: lines.append(" ".join(map(str, parts))))
        main(["validate-metrics", "--data=digits", "--images=120", f"--output={folder}", f"--cache_dir={folder}"])
    return folder, "\n".join(lines)


def test_values_are_written_and_plotted(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    result = read_anchors(folder / "digits-offline-v3.json")
    assert (result.protocol_sha256, len(result.networks)) == (OFFLINE_V3.sha256, 2)
    assert anchors("digits", "offline-v3", folder) == result.sets
    assert result.sets[0].images == 120
    assert min(anchor.images for anchor in result.sets) >= 20
    assert "90% of classes missing" not in {anchor.title for anchor in result.sets}  # 12 images
    assert (folder / "digits-offline-v3.png").read_bytes().startswith(b"\x89PNG")
    keys = {f"fd_unbiased_digits{end}" for end in ("", "_ae")} | {"authenticity_digits_ae", "coverage_digits_ae"}
    assert all(keys <= anchor.metrics.keys() for anchor in result.sets)


def test_copies_of_training_images_are_found_and_distances_do_not_see_them(measured: tuple[Path, str]) -> None:
    by_title = {anchor.title: anchor.metrics for anchor in anchors("digits", "offline-v3", measured[0])}
    real, copied = by_title["real test images"], by_title["training images, 100%"]
    assert copied["authenticity_digits_ae"].value == 0 < real["authenticity_digits_ae"].value
    assert copied["fd_unbiased_digits_ae"].value < real["fd_unbiased_digits_ae"].value


def test_the_report_fits_80_columns(measured: tuple[Path, str]) -> None:
    report = measured[1]
    lines = [line for line in report.splitlines() if ".json" not in line and ".png" not in line]
    assert max(map(len, lines)) <= 80
    for part in ("digits_ae", "overlays, 100%", "orders of known sets", "violated"):
        assert part in report


def test_nothing_is_overwritten(measured: tuple[Path, str]) -> None:
    with pytest.raises(FileExistsError, match=r"digits-offline-v3\.json.* exists already; .*--output"):
        main(["validate-metrics", "--data=digits", f"--output={measured[0]}"])
