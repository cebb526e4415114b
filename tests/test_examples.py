"""Methods of a package outside the suite, trained, measured, repeated and loaded as a user would."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmark import load, measure, records, sample
from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.external import external_code
from leaderboard.record.records import find_records, read_record
from systems import SDDPM
from systems.base import DiffusionSystem

EXAMPLES = Path(__file__).parent / "examples"
ROOT = Path(__file__).parents[1]
METHODS = {"mlp.MLPDiffusion": "spiking-mlp", "one_shot.SpikingVAE": "spiking-vae"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a copy of the package, which the tests may edit, on the import path."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(EXAMPLES / "mypackage", folder / "mypackage", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(folder))
        yield folder
        for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
            del sys.modules[name]


def train(method: str, folder: Path) -> Path:
    options = ["--trainer.max_steps=4", "--data.batch_size=64", "--monitor.every_n_epochs=1", "--data.num_samples=40"]
    options += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--trainer.default_root_dir={folder}"]
    main(["fit", f"--model=mypackage.{method}", "--data=Digits", *options])
    main(["test", "--draft", "--evaluation.protocol=offline-v1", f"--trainer.default_root_dir={folder}"])
    return newest_run(folder)


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(request.param, tmp_path_factory.mktemp("runs"))


def test_a_method_outside_the_suite_leaves_a_record_that_names_its_code(run: Path, package: Path) -> None:
    (path,) = find_records([run])
    record = read_record(path)
    assert record.method in METHODS.values()
    (name,) = record.code.external
    code = record.code.external[name]
    assert (name, code.distribution, code.git_commit) == ("mypackage", None, None)
    assert len(code.sha256) == 64
    assert record.cost.firing_rate > 0
    assert record.cost.parameters > 10_000
    assert record.nfe == (1 if record.method == "spiking-vae" else 50)
    assert record.solver == ("one shot" if record.method == "spiking-vae" else "DDPM")


def test_a_run_is_loaded_by_its_folder_or_checkpoint_and_sampled(run: Path, package: Path) -> None:
    system, data = load(run)
    images = sample(system, data, 5, seed=3)
    assert (images.shape, images.dtype) == ((5, 1, 8, 8), torch.uint8)
    assert torch.equal(images[2:], sample(system, data, 3, seed=5, batch_size=2))
    again = type(system).load_from_checkpoint(find_checkpoint(run))
    assert torch.equal(images, sample(again, data, 5, seed=3))
    with pytest.raises(ValueError, match="is not one of SDDPM"):
        SDDPM.load_from_checkpoint(find_checkpoint(run))


def test_a_checkpoint_outside_its_run_has_its_configuration(run: Path, package: Path, tmp_path: Path) -> None:
    copied = shutil.copy(find_checkpoint(run), tmp_path / "alone.ckpt")
    system, data = load(copied)
    assert torch.equal(sample(system, data, 2), sample(*load(run), 2))


def test_a_neuron_outside_the_suite_trains_in_a_published_method(
    package: Path, uncompiled: None, tmp_path: Path
) -> None:
    options = ["--model.neuron=mypackage.neuron.AdaptiveLeaky", "--model.base_channels=4", "--model.channel_mult=[1]"]
    options += ["--trainer.max_steps=3", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--config=configs/quickstart.yaml", *options, "--monitor.every_n_epochs=0"])
    system, _ = load(newest_run(tmp_path))
    thresholds = [p for name, p in system.named_parameters() if name.endswith("threshold")]
    assert thresholds
    assert all(0 < abs(float(p) - 1) < 0.1 for p in thresholds if p.requires_grad)  # moved by three steps
    assert external_code(system, None).keys() == {"mypackage"}


def test_samples_measured_from_python_have_the_metrics_of_the_record(run: Path, package: Path) -> None:
    system, data = load(run)
    measured = measure(sample(system, data, 40), data, "offline-v1", draft=True)
    assert measured == read_record(find_records([run])[0]).metrics
    with pytest.raises(ValueError, match="not 40"):
        measure(sample(system, data, 40), data, "offline-v1")


def test_records_are_read_as_a_data_frame(run: Path) -> None:
    frame = records([run])
    assert len(frame) == 1
    row = frame.iloc[0]
    assert (row["dataset"], row["protocol"], row["status"]) == ("digits", "offline-v1", "draft")
    assert row["fd_digits"] == read_record(find_records([run])[0]).metrics["fd_digits"].value


def test_verify_finds_edited_and_missing_code(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("one_shot.SpikingVAE", tmp_path / "runs")
    (record,) = find_records([run])
    checkpoint = f"--checkpoint={find_checkpoint(run)}"
    main(["leaderboard", "verify", str(record), checkpoint, f"--output={tmp_path / 'same'}"])
    assert "code, data and weights: the same" in capsys.readouterr().out
    with (package / "mypackage" / "mlp.py").open("a") as file:
        file.write("# an edit\n")
    main(["leaderboard", "verify", str(record), checkpoint, f"--output={tmp_path / 'edited'}"])
    shown = capsys.readouterr().out
    assert "sha256 of mypackage" in shown
    assert "agrees with its repetition by other source code of mypackage" in " ".join(shown.split())
    monkeypatch.setattr("benchmark.commands.verify.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["leaderboard", "verify", str(record), checkpoint, f"--output={tmp_path / 'missing'}"])
    assert stop.value.code == 2
    assert "a package that is not found here: mypackage (not a distribution" in capsys.readouterr().err


def test_external_code_has_the_commit_of_its_own_checkout(package: Path, tmp_path: Path) -> None:
    from mypackage.mlp import MLPDiffusion

    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(package), *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    system = MLPDiffusion(hidden=4)
    assert external_code(system, None)["mypackage"].git_commit is None
    git("init", "-q")
    git("add", "mypackage/mlp.py", "mypackage/__init__.py")
    git("commit", "-qm", "first")
    assert external_code(system, None)["mypackage"].git_dirty is True  # one_shot.py is new
    git("add", "mypackage/*.py")
    git("commit", "-qm", "second")
    code = external_code(system, None)["mypackage"]
    assert (code.git_commit, code.git_dirty) == (git("rev-parse", "HEAD"), False)
    with (package / "mypackage" / "one_shot.py").open("a") as file:
        file.write("# an edit\n")
    edited = external_code(system, None)["mypackage"]
    assert edited.git_dirty is True
    assert edited.sha256 != code.sha256
    assert external_code(SDDPM(base_channels=4, channel_mult=[1], num_res_blocks=1), None) == {}


def test_a_folder_of_the_user_does_not_shadow_the_suite(tmp_path: Path) -> None:
    for name in ("systems", "datamodules", "leaderboard"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not the suite')")
    code = "import benchmark, systems.base; print(systems.__file__, benchmark.DiffusionSystem.__name__)"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert shown == [str(ROOT / "systems" / "__init__.py"), "DiffusionSystem"]


def test_an_unknown_name_of_the_interface_lists_the_known() -> None:
    import benchmark

    with pytest.raises(AttributeError, match="exports load, sample, measure, records"):
        benchmark.nothing  # noqa: B018


def test_the_guide_shows_the_example_that_is_tested() -> None:
    guide = (ROOT / "systems" / "README.md").read_text()
    example = (EXAMPLES / "mypackage" / "one_shot.py").read_text()
    assert example in guide
    assert len(example.splitlines()) < 60


class Incomplete(DiffusionSystem):
    num_steps = 0
    nfe = None


def test_the_contract_names_everything_that_is_missing_at_once(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError) as error:
        Incomplete().check_contract()
    for part in ("implement `loss(", "implement `trajectory(", "`num_steps` must be", "`nfe` must be"):
        assert part in str(error.value)
    assert "`method`" not in str(error.value)  # the name of the class
    with pytest.raises(NotImplementedError, match="is not a complete method"):
        main(["fit", f"--model={__name__}.Incomplete", "--data=Digits", f"--trainer.default_root_dir={tmp_path}"])
    assert not any(tmp_path.iterdir())


def test_a_subclass_does_not_inherit_the_name_of_its_method() -> None:
    assert type("Own", (SDDPM,), {}).method == "own"
    assert type("Own", (SDDPM,), {"method": "named"}).method == "named"


def test_configuration_is_json(run: Path) -> None:
    content = torch.load(find_checkpoint(run), weights_only=True)["configuration"]
    assert json.loads(json.dumps(content)) == content
    assert content.keys() == {"seed_everything", "model", "data", "trainer"}
    assert content["trainer"].keys() == {"precision"}


def test_a_callback_exchanges_the_last_convolution_for_that_of_another_seed(package: Path, tmp_path: Path) -> None:
    """The table in `systems/README.md` depends on it: the layer equals the one that the other seed would draw."""
    options = ["--config=configs/track/sddpm_relu_mnist.yaml", "--data=Digits", "--data.image_size=8"]
    options += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--model.optimizer.init_args.lr=0"]
    options += ["--model.lr_scheduler=null"]
    kernel = ["--trainer.callbacks+=mypackage.kernel.Kernel", "--trainer.callbacks.seed=0"]
    weights = []
    for seed, extra in ((0, []), (1, kernel)):
        runs = tmp_path / str(seed)
        main(["fit", *options, f"--seed_everything={seed}", f"--trainer.default_root_dir={runs}", *extra])
        weights.append(load(str(find_checkpoint(newest_run(runs))))[0].network.state_dict())
    first, second = weights
    assert torch.equal(first["T_output_layer.weight"], second["T_output_layer.weight"])
    assert not torch.equal(first["tail_conv.weight"], second["tail_conv.weight"])
