from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmark.cli import main
from datamodules import MNIST, Digits, ImageDataModule
from leaderboard.evaluation.reference import build_parts, num_reference, prepare_reference, reference, reference_batches
from leaderboard.metrics.fad import FADEncoder
from leaderboard.protocols import OFFLINE_V1, PROTOCOLS, Reference

CPU = torch.device("cpu")
NONE = (None, None, None)
STATES = 5
"""Number of arrays of a reference: sum, outer product and count; feature table and its row counts."""


def prepare(data: ImageDataModule, fad_dir: str | None = None) -> list:
    parts = build_parts(OFFLINE_V1, data, NONE, fad_dir)
    prepare_reference(parts, data, OFFLINE_V1, CPU)
    return parts


def states(parts: list) -> dict[str, Tensor]:
    return {
        f"{i}.{name}.{state}": value.clone()
        for i, part in enumerate(parts)
        for name, metric in part.reference_metrics().items()
        for state, value in metric.metric_state.items()
        if state.startswith("reference")
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def kept(digits: Digits) -> Path:
    """The file of the digits under offline-v1, the only one in the cache."""
    for path in digits.cache_dir.glob("reference-*"):
        path.unlink()
    prepare(digits)
    (path,) = digits.cache_dir.glob("reference-digits-offline-v1-*.safetensors")
    return path


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function after whose call any access to the real images fails."""

    def forbid() -> None:
        def fail(*args: object) -> None:
            raise AssertionError("the real images were read again")

        monkeypatch.setattr(ImageDataModule, "reference_batches", fail)

    return forbid


def test_computed_once_and_restored_bit_for_bit(
    digits: Digits, kept: Path, no_images: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    kept.unlink()
    capsys.readouterr()
    fresh = prepare(digits)
    assert f"reference: {kept.name} (new)" in capsys.readouterr().out
    no_images()
    again = prepare(digits)
    assert capsys.readouterr().out.strip() == f"reference: {kept.name}"
    assert len(states(fresh)) == STATES
    assert same(states(fresh), states(again))
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8)
    values = []
    for (part,) in (fresh, again):
        part.update_generated(images, torch.arange(50))
        values.append(part.compute())
    assert values[0] == values[1]
    assert not list(digits.cache_dir.glob("*.part"))


def test_statistics_do_not_depend_on_batch_sizes(digits: Digits, kept: Path) -> None:
    expected = states(prepare(digits))
    kept.unlink()
    other = Digits(cache_dir=str(digits.cache_dir), sample_batch_size=7, batch_size=3)
    assert same(states(prepare(other)), expected)


def flip_a_bit(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "its content does not match its checksum"),
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content[:7], "is damaged"),
        (lambda content: b"", "is damaged"),
        (lambda content: content.replace(b"digits", b"stigid"), "it belongs to another dataset, protocol or network"),
    ],
)
def test_damaged_file_is_computed_again(
    digits: Digits, kept: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    expected, content = states(prepare(digits)), kept.read_bytes()
    kept.write_bytes(damage(content))
    assert kept.read_bytes() != content
    with pytest.warns(
        UserWarning, match=rf"{kept.name} is damaged .*; the reference statistics are computed again"
    ) as warned:
        found = states(prepare(digits))
    assert message in str(warned[0].message)
    assert same(found, expected)
    assert same(states(prepare(digits)), expected)  # the new file is whole


def test_another_network_protocol_or_geometry_has_a_file_of_its_own(digits: Digits, kept: Path) -> None:
    prepare(Digits(cache_dir=str(digits.cache_dir), image_size=16, fit="resize"))
    (part,) = build_parts(OFFLINE_V1, digits, NONE, None)
    part.identity = "another network"
    prepare_reference([part], digits, OFFLINE_V1, CPU)
    changed = replace(OFFLINE_V1, jackknife_groups=5)
    prepare_reference(build_parts(changed, digits, NONE, None), digits, changed, CPU)
    assert len(list(digits.cache_dir.glob("reference-digits-*"))) == 4


def test_folder_that_cannot_be_written_only_warns(digits: Digits, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    kept.unlink()
    monkeypatch.setattr("leaderboard.evaluation.reference.write_atomic", full)
    with pytest.warns(UserWarning, match=r"cannot be written .*no space left.* --data\.cache_dir"):
        assert len(states(prepare(digits))) == STATES


def test_images_of_a_reference(digits: Digits) -> None:
    def images(**options: object) -> Tensor:
        fields = {"split": "test", "split_of": {}, "images": None, "mirrored": {}} | options
        protocol = replace(OFFLINE_V1, reference=Reference(**fields))
        batches = list(reference_batches(digits, protocol))
        indices = torch.cat([index for _, index in batches])
        assert indices.tolist() == list(range(num_reference(digits, protocol)))
        return torch.cat([batch for batch, _ in batches])

    plain = torch.cat(list(digits.reference_batches("test")))
    assert torch.equal(images(), plain)
    assert torch.equal(images(images=150), plain[:150])
    assert len(images(images=10_000)) == len(plain) == 297
    assert len(images(split_of={"digits": "train"})) == 1500
    assert len(images(split_of={"mnist": "train"})) == 297
    mirrored = images(mirrored={"digits": 0})
    assert torch.equal(mirrored, images(mirrored={"digits": 0}))
    turned = (mirrored == plain.flip(-1)).flatten(1).all(1)
    assert 0.4 < float(turned.float().mean()) < 0.6
    assert torch.equal(mirrored[~turned], plain[~turned])
    assert not torch.equal(mirrored, images(mirrored={"digits": 1}))


def mnist(tmp_path: Path) -> MNIST:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "1").mkdir(parents=True)
        for k in range(30):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "1" / f"{k:02d}.png")
    return MNIST(root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


def test_reference_of_the_autoencoder_is_cached_too(
    tmp_path: Path, no_images: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = mnist(tmp_path), tmp_path / "fad"
    for name in ("stat_checkpoints", "stats"):
        (folder / name).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(FADEncoder(1, 64).state_dict(), folder / "stat_checkpoints" / "mnist_64.pth")
    np.savez(folder / "stats" / "mnist_test_64.npz", mu=np.zeros(64), sigma=np.eye(64))
    protocol = replace(OFFLINE_V1, views=())
    fresh, again = (build_parts(protocol, data, NONE, str(folder)) for _ in range(2))
    prepare_reference(fresh, data, protocol, CPU)
    no_images()
    prepare_reference(again, data, protocol, CPU)
    assert len(states(fresh)) == 3
    assert same(states(fresh), states(again))
    with pytest.raises(ValueError, match=r"paper-sddpm measures no .* leave out --evaluation\.fad_dir"):
        build_parts(PROTOCOLS["paper-sddpm"], data, NONE, str(folder))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_several_processes_write_the_same_statistics_as_one(digits: Digits, kept: Path) -> None:
    expected = states(prepare(digits))
    kept.unlink()
    context = multiprocessing.get_context("fork")
    rendezvous = digits.cache_dir / "rendezvous"
    processes = [context.Process(target=one_of_two, args=(digits, rendezvous, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = states(prepare(digits))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def one_of_two(data: Digits, rendezvous: Path, rank: int) -> None:
    """Runs in each process of the test above."""
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    def broadcast(value: bool) -> bool:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    for _ in range(2):
        parts = build_parts(OFFLINE_V1, data, NONE, None)
        prepare_reference(parts, data, OFFLINE_V1, CPU, rank, 2, broadcast)
        (part,) = parts
        count = part.reference_metrics()["frechet"].reference_count.clone()
        torch.distributed.all_reduce(count)
        assert int(count) == 1500, "every image once, whether computed or cached"
    torch.distributed.destroy_process_group()


def test_command_prepares_what_a_test_needs(
    tmp_path: Path, no_images: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reference", "--data", "digits", "--protocol", "offline-v1", "--cache_dir", str(tmp_path)])
    assert "(new)" in capsys.readouterr().out
    no_images()
    prepare(Digits(cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"cannot be prepared: it is defined for mnist, .* not for digits"):
        reference("digits", "paper-sddpm", cache_dir=str(tmp_path))
    for data, message in (
        ("sky", "data='sky' is not a dataset of the suite"),
        ("", "give either the name of a dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["reference", f"--data={data}"])
