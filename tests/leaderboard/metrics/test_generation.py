from __future__ import annotations

import json
import multiprocessing
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from leaderboard.extractors.base import Extractor
from leaderboard.metrics.feature_metrics import authenticity, density_coverage, unbiased_kernel_distance
from leaderboard.metrics.generation import GenerationMetrics
from leaderboard.metrics.streaming import FeatureTable, FrechetDistance, StreamingInceptionScore
from leaderboard.protocols import INCEPTION
from leaderboard.record.records import MetricValue

WIDTH = 6
KEPT = 150
KERNEL = {"subsets": 10, "subset_size": 40, "seed": 0}
OWN = {"fd": {}, "kd": KERNEL, "precision_recall": {"neighbours": 3}}
OF_INCEPTION = {"fid": {}, "kid": KERNEL, "is": {"splits": 10}, "precision_recall": {"neighbours": 3}}


class Projection(Extractor):
    """Projects the pixels at random, in float64 so that batching cannot round differently."""

    def __init__(self, name: str = "toy") -> None:
        super().__init__(name, num_features=WIDTH, num_classes=5, sha256="0" * 64)
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(16, WIDTH + 5, generator=generator, dtype=torch.float64)
        self.batches: list[int] = []

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(images))
        both = (images.flatten(1).double() / 255) @ self.matrix
        return both[:, :WIDTH], both[:, WIDTH:]


class Identity(torch.nn.Module):
    num_features = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        return x


def pictures(count: int, seed: int, high: int = 256) -> Tensor:
    return torch.randint(high, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


REAL, FAKE = pictures(230, seed=1), pictures(210, seed=2, high=200)


def evaluate(
    metrics: GenerationMetrics, real: Tensor = REAL, fake: Tensor = FAKE, batch: int = 64, shuffle: bool = False
) -> dict[str, MetricValue]:
    order = [torch.randperm(len(x)) if shuffle else torch.arange(len(x)) for x in (real, fake)]
    for index in order[0].split(batch):
        metrics.update_reference(real[index], index)
    for index in order[1].split(batch):
        metrics.update_generated(fake[index], index)
    return metrics.compute()


def toy(name: str = "toy") -> GenerationMetrics:
    return GenerationMetrics(Projection(name), OF_INCEPTION if name == INCEPTION else OWN, len(REAL), kept_images=KEPT)


SPREAD = torch.arange(KEPT) * len(REAL) // KEPT  # the real images whose features are kept


def test_values_are_those_of_torchmetrics() -> None:
    values = evaluate(toy(INCEPTION))
    extractor = Projection()
    (real, _), (fake, logits) = extractor(REAL), extractor(FAKE)
    fid = FrechetInceptionDistance(feature=Identity())
    fid.update(real, real=True)
    fid.update(fake, real=False)
    assert values["fid"].value == pytest.approx(float(fid.compute()), rel=1e-9)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        kid = KernelInceptionDistance(feature=Identity(), subsets=10, subset_size=40)
        kid.update(real[SPREAD].float().double(), real=True)
        kid.update(fake[:KEPT].float().double(), real=False)
        torch.manual_seed(0)
        mean, std = kid.compute()
    assert values["kid_mean"].value == pytest.approx(float(mean), rel=1e-9)
    assert values["kid_mean"].uncertainty == pytest.approx(float(std), rel=1e-9)
    scores = torch.tensor([_score(logits[split::10]) for split in range(10)], dtype=torch.float64)
    assert values["is_mean"].value == pytest.approx(float(scores.mean()), rel=1e-6)
    assert values["is_mean"].uncertainty == pytest.approx(float(scores.std()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*save all extracted features.*", "ignore:.*degrees of freedom.*")
def _score(logits: Tensor) -> float:
    """torchmetrics' Inception score of one split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = InceptionScore(feature=Identity(), splits=1)
        metric.update(logits)
        return float(metric.compute()[0])


def test_inception_score_of_one_split() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = StreamingInceptionScore(5, splits=1)
    metric.update(logits, torch.arange(40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one split has no standard deviation
        assert float(metric.compute()[0]) == pytest.approx(_score(logits), rel=1e-9)


def test_jackknife_is_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(100, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    metric = FrechetDistance(WIDTH)
    metric.update(real, torch.arange(100), real=True)
    metric.update(fake, torch.arange(100), real=False)
    error = metric.compute()[0, 1]
    left_out = []
    for group in range(10):
        fid = FrechetInceptionDistance(feature=Identity())
        fid.update(real, real=True)
        fid.update(fake[torch.arange(100) % 10 != group], real=False)
        left_out.append(fid.compute())
    parts = torch.stack(left_out)
    assert float(error) == pytest.approx(float((9 / 10 * (parts - parts.mean()).square().sum()).sqrt()), rel=1e-6)


def test_jackknife_error_is_about_the_spread_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    values, errors = [], []
    for _ in range(10):
        metric = FrechetDistance(2)
        metric.update(real, torch.arange(4000), real=True)
        metric.update(torch.randn(400, 2, generator=generator, dtype=torch.float64) + 1, torch.arange(400), real=False)
        value, error = metric.compute()[0, :2]
        values.append(value)
        errors.append(error)
    assert 0.5 < float(torch.stack(errors).mean() / torch.stack(values).std()) < 2


@pytest.mark.parametrize("name", [INCEPTION, "toy"])
def test_neither_batch_size_nor_order_matters(name: str) -> None:
    expected = evaluate(toy(name))
    for batch, shuffle in ((1, False), (7, True), (1000, True)):
        found = evaluate(toy(name), batch=batch, shuffle=shuffle)
        for key, value in expected.items():
            assert found[key].value == pytest.approx(value.value, rel=1e-6), key
            assert found[key].uncertainty == pytest.approx(value.uncertainty, rel=1e-6), key


def test_the_same_images_are_at_distance_zero() -> None:
    values = evaluate(toy(), fake=REAL)
    assert values["fd_toy"].value == pytest.approx(0, abs=1e-6)
    assert abs(values["kd_toy"].value) < 3 * values["kd_toy"].uncertainty


def test_only_inception_returns_fid() -> None:
    assert set(evaluate(toy(INCEPTION))) == {"fid", "kid_mean", "is_mean", "precision", "recall"}
    assert set(evaluate(toy())) == {"fd_toy", "kd_toy", "precision_toy", "recall_toy"}
    with pytest.raises(ValueError, match=r"metrics=\['fid'\] cannot be .* extractor 'toy'; choose from: fd, fd_un"):
        GenerationMetrics(Projection(), {"fid": {}}, 100)
    with pytest.raises(ValueError, match="choose from: fid, fid_newton_schulz, fid_unbiased, kid, is"):
        GenerationMetrics(Projection(INCEPTION), {"fd": {}}, 100)
    with pytest.raises(ValueError, match="choose from: fid_svd, is"):
        GenerationMetrics(Projection("torchvision"), {"fid": {}}, 100)


def test_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = evaluate(toy())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert evaluate(toy()) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_state_does_not_grow_and_each_batch_is_extracted_once() -> None:
    def size(metrics: GenerationMetrics) -> int:
        return sum(state.nbytes for m in metrics.metrics.values() for state in m.metric_state.values())

    metrics = toy(INCEPTION)
    empty = size(metrics)
    for start in range(0, 2000, 200):
        metrics.update_generated(pictures(200, seed=start), torch.arange(start, start + 200))
    assert size(metrics) == empty
    assert metrics.extractor.batches == [200] * 10


@pytest.mark.parametrize("parts", [2, 3])
def test_states_of_several_processes_merge_by_sums(parts: int) -> None:
    """Under distributed evaluation torchmetrics sums the states of the processes, as `merge_state` does here."""
    expected = evaluate(toy(INCEPTION))
    processes = [toy(INCEPTION) for _ in range(parts)]
    for rank, process in enumerate(processes):
        real, fake = torch.arange(rank, len(REAL), parts), torch.arange(rank, len(FAKE), parts)
        process.update_reference(REAL[real], real)
        process.update_generated(FAKE[fake], fake)
    first, *others = processes
    for other in others:
        for mine, theirs in zip(first.metrics.values(), other.metrics.values(), strict=True):
            mine.merge_state(theirs)
        first.generated_count.merge_state(other.generated_count)
    for key, value in first.compute().items():
        assert value.value == pytest.approx(expected[key].value, rel=1e-6)
        assert value.uncertainty == pytest.approx(expected[key].uncertainty, rel=1e-6)
        assert value.num_samples == expected[key].num_samples


def test_every_state_is_summed_over_processes() -> None:
    for metric in (FrechetDistance(3), FeatureTable(3, 10, 20), StreamingInceptionScore(3)):
        assert {f.__name__ for f in metric._reductions.values()} == {"dim_zero_sum"}


def test_kernel_distance_uses_the_first_images_only() -> None:
    values = evaluate(toy())
    assert (values["kd_toy"].num_samples, values["fd_toy"].num_samples) == (150, 210)
    changed = FAKE.clone()
    changed[150:] = 0
    assert evaluate(toy(), fake=changed)["kd_toy"] == values["kd_toy"]


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        inside = evaluate(toy())
    assert inside == evaluate(toy())


@pytest.mark.parametrize("total", [10, 15, 150, 151, 230, 1500, 4096])
def test_kept_real_images_are_spread_over_their_split(total: int) -> None:
    table = FeatureTable(1, 15, total)
    for index in torch.arange(total).split(7):
        table.update(index[:, None], index, real=True)
    table.update(torch.zeros(1, 1), torch.tensor([0]), real=False)
    rows = min(15, total)
    assert table.compute()[0].flatten().tolist() == [r * total // rows for r in range(rows)]


def test_singular_covariance_is_noted() -> None:
    wide = Projection()
    wide.num_features = 40
    wide.matrix = torch.randn(16, 45, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide.extract = lambda images: ((images.flatten(1) / 255.0).double() @ wide.matrix[:, :40], None)
    values = evaluate(GenerationMetrics(wide, {"fd": {}}, len(REAL)), fake=FAKE[:30])
    assert values["fd_toy"].note == "singular covariance: only 30 generated images for 40 features"
    assert evaluate(toy())["fd_toy"].note == ""


def test_too_few_images_and_wrong_indices_are_refused() -> None:
    metrics = toy()
    metrics.update_reference(REAL, torch.arange(len(REAL)))
    metrics.update_generated(FAKE[:19], torch.arange(19))
    with pytest.raises(ValueError, match="19 generated images are too few to compare; give at least 20"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"19 images came with indices of shape \(3,\); give one index per image"):
        metrics.update_generated(FAKE[:19], torch.arange(3))


def test_other_matrix_roots_have_their_own_names() -> None:
    values = evaluate(GenerationMetrics(Projection(INCEPTION), {"fid": {}, "fid_newton_schulz": {}}, len(REAL)))
    assert values["fid_newton_schulz"].value == pytest.approx(values["fid"].value, rel=1e-3)
    svd = evaluate(GenerationMetrics(Projection("torchvision"), {"fid_svd": {}}, len(REAL)))
    assert set(svd) == {"fid_svd"}
    assert svd["fid_svd"].value > values["fid"].value


def test_diverging_iterations_are_omitted() -> None:
    metrics = GenerationMetrics(Projection(INCEPTION), {"fid": {}, "fid_newton_schulz": {}}, len(REAL))
    same = torch.full_like(FAKE, 7)
    with pytest.warns(UserWarning, match="fid_newton_schulz is omitted: its Newton-Schulz iterations diverge"):
        assert set(evaluate(metrics, fake=same)) == {"fid"}


def test_inception_score_needs_no_real_images() -> None:
    metrics = GenerationMetrics(Projection("torchvision"), {"is": {"splits": 4}}, len(REAL))
    assert metrics.reference_metrics() == {}
    metrics.update_generated(FAKE, torch.arange(len(FAKE)))
    assert set(metrics.compute()) == {"is_torchvision"}


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_return_the_same_as_one(tmp_path: Path) -> None:
    """Under gloo, each process with every other image; forked, to save the time of the imports."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = evaluate(toy(INCEPTION))
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key]["value"] == pytest.approx(value.value, rel=1e-6), key
            assert found[key]["uncertainty"] == pytest.approx(value.uncertainty, rel=1e-6), key
            assert found[key]["num_samples"] == value.num_samples


def one_of_two(folder: Path, rank: int) -> None:
    """Runs in each process of the test above."""
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metrics = toy(INCEPTION)
    real, fake = torch.arange(rank, len(REAL), 2), torch.arange(rank, len(FAKE), 2)
    metrics.update_reference(REAL[real], real)
    metrics.update_generated(FAKE[fake], fake)
    values = metrics.compute()
    (folder / f"found-{rank}.json").write_text(json.dumps({key: asdict(value) for key, value in values.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


V2 = {
    "fd": {},
    "fd_unbiased": {},
    "fd_infinity": {},
    "kd": {},
    "density_coverage": {"neighbours": 5, "images": 100},
    "precision_recall": {"neighbours": 3, "images": 100},
    "authenticity": {},
}


@pytest.mark.parametrize("shuffle", [False, True])
def test_families_of_the_second_protocols(shuffle: bool) -> None:
    metrics = GenerationMetrics(Projection(), V2, len(REAL), kept_images=KEPT)
    values = evaluate(metrics, shuffle=shuffle)
    (real, _), (fake, _) = Projection()(REAL), Projection()(FAKE)
    real, fake = real.float().double(), fake.float().double()
    groups = torch.arange(len(FAKE)) % 10
    hundred = real[torch.arange(100) * len(REAL) // 100]
    density, coverage = density_coverage(hundred, fake[:100], groups[:100])
    share, nearest = authenticity(real, fake[:KEPT], groups[:KEPT])
    kernel = unbiased_kernel_distance(real[SPREAD], fake[:KEPT])
    for key, expected, count in (
        ("density_toy", density, 100),
        ("coverage_toy", coverage, 100),
        ("authenticity_toy", share, KEPT),
        ("kd_toy", kernel, KEPT),
    ):
        assert values[key].value == pytest.approx(float(expected[0]), rel=1e-9)
        assert values[key].uncertainty == pytest.approx(float(expected[1]), rel=1e-9)
        assert values[key].num_samples == count
    assert metrics.nearest is not None
    assert metrics.nearest.tolist() == nearest.tolist()
    assert values["fd_toy"].value == pytest.approx(evaluate(toy())["fd_toy"].value, rel=1e-9)
    assert values["fd_unbiased_toy"].value < values["fd_toy"].value
    assert values["fd_infinity_toy"].value == pytest.approx(values["fd_unbiased_toy"].value, rel=0.2)
    assert values["precision_toy"].num_samples == 100


def test_a_correction_needs_its_distance() -> None:
    with pytest.raises(ValueError, match="corrects 'fd' without measuring it"):
        GenerationMetrics(Projection(), {"fd_unbiased": {}}, 100)
