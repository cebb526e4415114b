"""Several processes train as one with the same global batch does, and end together."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import layout
import pytest
import torch
from tiny import CALM, SPIKING_DIFFUSION, fit, forked
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmark.runs import find_checkpoint, newest_run
from datamodules.loading import FilledBatches, TrainingOrder
from systems import FSDDIM, SDDPM, SpikingDiffusion, SpikingRWKV
from systems.base import DiffusionSystem
from systems.diffusion.gaussian import GaussianDiffusion

pytestmark = pytest.mark.slow

OPTIONS = [
    "--config=configs/ddpm_fmnist.yaml",  # group norm; averaged weights
    *CALM,
    "--trainer.max_steps=-1",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.callbacks.decay=0.5",
    "--model.base_channels=32",
    "--model.channel_mult=[1]",
    "--model.num_res_blocks=1",
    "--model.dropout=0",
    "--model.activation_bits=32",
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.05",
    "--data=Digits",
    "--data.image_size=8",
    "--data.val_size=300",
]
TWO = ["--data.batch_size=64", "--trainer.strategy=ddp", "--trainer.limit_train_batches=4"]
SCRIPT = str(Path(layout.__file__))


def curves(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {name: [s.value for s in events.Scalars(name)] for name in ("train/loss", "val/loss")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianDiffusion, "loss", layout.loss)
        options = ["--data.batch_size=128", "--trainer.limit_train_batches=4"]
        return fit(tmp_path_factory.mktemp("alone"), *OPTIONS, *options)


def assert_equal_training(run: Path, alone: Path) -> None:
    for name, values in curves(alone).items():
        assert len(values) == {"train/loss": 8, "val/loss": 2}[name]
        torch.testing.assert_close(curves(run)[name], values, rtol=1e-6, atol=0)
    ours, theirs = (torch.load(find_checkpoint(path), weights_only=True) for path in (run, alone))
    for kind in ("state_dict", "current_model_state"):  # averaged and plain
        torch.testing.assert_close(ours[kind], theirs[kind], rtol=1e-5, atol=1e-8)
    assert not torch.equal(*(ours[kind]["network.tail.2.weight"] for kind in ("state_dict", "current_model_state")))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_train_as_one(alone: Path, tmp_path: Path) -> None:
    place = f"--trainer.default_root_dir={tmp_path}"
    command = [sys.executable, SCRIPT, "fit", *OPTIONS, *TWO, "--trainer.devices=2", place]
    subprocess.run(command, env=environment(), check=True, timeout=200, capture_output=True)
    assert_equal_training(newest_run(tmp_path), alone)


def test_two_nodes_train_as_one(alone: Path, tmp_path: Path) -> None:
    port, nodes = free_port(), []
    for rank in range(2):
        launch = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        options = [*OPTIONS, *TWO, "--trainer.num_nodes=2", "--trainer.devices=1"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, f"--master_port={port}", SCRIPT, "fit"]
        command += [*options, f"--trainer.default_root_dir={tmp_path}"]
        nodes.append(subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert_equal_training(newest_run(tmp_path), alone)


def two_of(work: Callable[[], object], folder: Path) -> list[int | None]:
    """Runs two processes, forked as if a launcher had started them; returns their exit codes."""
    port = str(free_port())

    def process(rank: int) -> None:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        work()

    processes = [forked(partial(process, rank), folder / f"log{rank}") for rank in range(2)]
    for each in processes:
        each.join(100)
    hanging = [each for each in processes if each.exitcode is None]
    for each in hanging:
        each.kill()
    assert not hanging
    return [each.exitcode for each in processes]


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_training(dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> None:
        DiffusionSystem.on_train_batch_start = layout.die  # type: ignore[method-assign]
        fit(tmp_path, *OPTIONS, *TWO, "--trainer.devices=2", "--last.every_n_train_steps=1")

    monkeypatch.setenv("DIES", str(dies))
    codes = two_of(train, tmp_path)
    assert (codes[dies], codes[1 - dies]) == (-signal.SIGKILL, 1)
    assert f"process {1 - dies} of 2 lost the connection to another one" in (tmp_path / f"log{1 - dies}").read_text()
    assert torch.load(find_checkpoint(newest_run(tmp_path)), weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_method_of_two_stages_trains_in_two_processes(uncompiled: None, tmp_path: Path) -> None:
    options = ["--model.autoencoder_epochs=1", "--model.denoiser_epochs=1", *TWO, "--trainer.devices=2"]
    assert two_of(lambda: fit(tmp_path, *SPIKING_DIFFUSION, *options), tmp_path) == [0, 0]
    content = torch.load(find_checkpoint(newest_run(tmp_path)), weights_only=True)
    assert (content["global_step"], content["in_stage_two"]) == (8, True)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_signal_to_one_process_stops_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(system: DiffusionSystem, batch: Tensor, batch_idx: int) -> None:
        if (system.global_rank, system.global_step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    def train() -> None:
        DiffusionSystem.on_train_batch_start = interrupt  # type: ignore[method-assign]
        fit(tmp_path, *OPTIONS, *TWO, "--trainer.devices=2")

    assert two_of(train, tmp_path) == [143, 0]
    assert "stopped by SIGTERM after step 3" in (tmp_path / "log0").read_text()
    assert torch.load(find_checkpoint(newest_run(tmp_path)), weights_only=True)["global_step"] == 3


def test_synchronised_batch_norm_needs_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    with pytest.raises(ValueError, match=r"--trainer.sync_batchnorm true needs GPUs, since torch does not synchronise"):
        fit(tmp_path, *OPTIONS, "--trainer.sync_batchnorm=true", "--trainer.callbacks=null")


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    return monkeypatch


def of_rank(rank: int, patch: pytest.MonkeyPatch, make: type, *args: object) -> list[int]:
    patch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    return list(make(range(100), *args))


def test_the_order_is_that_of_the_seed_and_the_epoch(two_processes: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: False)
        whole = list(TrainingOrder(range(100)))  # type: ignore[arg-type]
    shares = [of_rank(rank, two_processes, TrainingOrder) for rank in range(2)]
    assert [i for pair in zip(*shares, strict=True) for i in pair] == whole
    assert of_rank(0, two_processes, TrainingOrder, 7) == shares[0][7:]
    assert of_rank(0, two_processes, TrainingOrder, 0, 1) != shares[0]
    two_processes.setenv("PL_GLOBAL_SEED", "8")
    assert of_rank(0, two_processes, TrainingOrder) != shares[0]


def test_mirroring_is_that_of_the_place_in_the_order(two_processes: pytest.MonkeyPatch) -> None:
    def images(order: list[int]) -> list[int]:
        return [i if i >= 0 else ~i for i in order]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: False)
        whole = list(TrainingOrder(range(100), flip=True))  # type: ignore[arg-type]
    assert 35 < sum(i < 0 for i in whole) < 65  # three standard deviations
    shares = [of_rank(rank, two_processes, TrainingOrder, 0, 0, True) for rank in range(2)]
    assert [i for pair in zip(*shares, strict=True) for i in pair] == whole
    assert images(shares[0]) == of_rank(0, two_processes, TrainingOrder)
    assert of_rank(0, two_processes, TrainingOrder, 7, 0, True) == shares[0][7:]
    later = of_rank(0, two_processes, TrainingOrder, 0, 1, True)
    assert [i < 0 for i in later] != [i < 0 for i in shares[0]]
    two_processes.setenv("PL_GLOBAL_SEED", "8")
    assert [i < 0 for i in of_rank(0, two_processes, TrainingOrder, 0, 0, True)] != [i < 0 for i in shares[0]]


def test_an_order_resumed_within_an_epoch_ends_with_it() -> None:
    order = TrainingOrder(range(10), skip=4)  # type: ignore[arg-type]
    assert len(list(order)) == 6
    assert len(list(order)) == 10


def test_validation_takes_whole_batches_in_turn(two_processes: pytest.MonkeyPatch) -> None:
    shares = [of_rank(rank, two_processes, FilledBatches, 40) for rank in range(2)]
    assert shares == [[*range(40), *range(80, 100)], [*range(40, 80), *range(40)]]  # three batches, filled up


@pytest.mark.parametrize(
    "make",
    [
        partial(SDDPM, in_channels=1, base_channels=4, channel_mult=[1], num_res_blocks=1, num_steps=2),
        partial(FSDDIM, in_channels=1, base_channels=4, channel_mult=[1], num_res_blocks=1, num_steps=2, norm="plain"),
        partial(FSDDIM, in_channels=1, base_channels=4, channel_mult=[1], num_res_blocks=1, num_steps=2, norm="tdbn"),
        partial(SpikingRWKV, in_channels=1, image_size=8, embed_dim=8, depth=3, num_steps=2, num_heads=2),
        partial(SpikingDiffusion, num_codes=8, base_channels=8, num_steps=2, data_variance=0.1),
    ],
)
def test_synchronised_norms_are_the_same_layers(make: Callable[[], DiffusionSystem]) -> None:
    """With one process torch's conversion must change nothing; more of them need GPUs."""
    torch.manual_seed(0)
    system = make()
    names = [name for name, module in system.named_modules() if isinstance(module, _BatchNorm)]
    assert names
    images, state = torch.rand(4, 1, 8, 8) * 2 - 1, copy.deepcopy(system.state_dict())
    losses = []
    for convert in (lambda module: module, nn.SyncBatchNorm.convert_sync_batchnorm):
        system = convert(system)
        system.load_state_dict(state)
        losses.append(system.loss(images, torch.Generator().manual_seed(0)))
    assert all(isinstance(system.get_submodule(name), nn.SyncBatchNorm) for name in names)
    assert torch.equal(*losses)
