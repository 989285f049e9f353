"""Quantizer: exact codes, sums that are additive over workers, and revival of dead entries."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from models.config import QuantizerConfig
from models.quantizer import BatchSlice, CodebookSums, Quantizer, perplexity
from tests.gloo import run_ranks


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def absorbed(quantizer: Quantizer, latents: Tensor, steps: int = 1) -> Quantizer:
    """Let a quantizer absorb the same latents repeatedly. The first time only places its entries."""
    for step in range(steps):
        quantizer.absorb(quantizer(latents, BatchSlice(seed=0, step=step, start=0, total=len(latents))).sums)
    return quantizer


def test_codes_equal_brute_force_and_ties_go_to_the_lowest_entry():
    """For numbers that float32 computes exactly, every code is the first nearest entry."""
    quantizer = Quantizer(QuantizerConfig(), entries=96, dim=3)
    quantizer.codebook.copy_(torch.randint(-2, 3, (96, 3)).float())  # duplicates: 125 places for 96 entries
    latents = torch.randint(-5, 6, (5, 3, 30, 20)).float() / 2

    vectors = latents.permute(0, 2, 3, 1)
    distances = (vectors[..., None, :] - quantizer.codebook).square().sum(-1)

    assert torch.equal(quantizer(latents).codes, distances.argmin(-1))


def test_codes_are_nearest_up_to_rounding():
    """In blocks and float32, the chosen entry has the minimal distance in double precision up to rounding."""
    quantizer = Quantizer(QuantizerConfig(), entries=512, dim=64)
    quantizer.codebook.normal_()
    latents = torch.randn(3, 64, 40, 40)

    codes = quantizer(latents).codes.flatten()
    distances = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.codebook.double())

    chosen = distances.gather(1, codes[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-6, atol=0)
    assert (codes == distances.argmin(1)).float().mean() > 0.999


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4])
def test_codes_are_exact_far_from_the_origin(offset: float):
    """Codes equal a double-precision search also for latents at 1,000 and 30,000 times their spread."""
    latents = torch.randn(2, 64, 32, 32) + offset
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=512, dim=64), latents)
    vectors, codebook = latents.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.codebook.double()
    distances = torch.cdist(vectors, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(quantizer(latents).codes.flatten(), distances.argmin(1))


def test_centre_is_zero_for_entries_around_the_origin():
    """Otherwise the centre is near the mean, at a multiple of a power of two, so that subtracting it is exact."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=64, dim=4), torch.randn(2, 4, 16, 16))
    assert not quantizer._centre().any()
    quantizer.codebook += 1000
    assert (quantizer._centre() % 0.25 == 0).all()
    assert (quantizer._centre() - quantizer.mean()).abs().max() < 1


@pytest.mark.parametrize(("entries", "dim"), [(0, 4), (8, 0), (-1, 4)])
def test_empty_codebook_is_refused(entries: int, dim: int):
    """The error has both sizes."""
    with pytest.raises(ValueError, match=f"entries and dim must be 1 or more, got {entries} and {dim}"):
        Quantizer(QuantizerConfig(), entries, dim)


def test_quantized_latents_are_entries_and_gradients_pass_straight_through():
    """Quantized latents equal `lookup(codes)` exactly, and the input gets their gradient."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=8, dim=4), torch.randn(2, 4, 3, 5))
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    weights = torch.randn(2, 4, 3, 5)

    quantized = quantizer(latents)
    (quantized.latents * weights).sum().backward()

    assert torch.equal(quantized.latents, quantizer.lookup(quantized.codes))
    assert torch.equal(latents.grad, weights)


def test_forward_does_not_change_the_state():
    """The state dict stays the same in training and in evaluation."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=8, dim=4), torch.randn(2, 4, 3, 5))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for training in (True, False):
        quantizer.train(training)(torch.randn(2, 4, 3, 5))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_decay_zero_is_one_lloyd_step():
    """Entries move to the mean of their vectors, and entries that are not chosen stay."""
    quantizer = absorbed(
        Quantizer(QuantizerConfig(decay=0.0, revive_every=0, epsilon=1e-9), 6, 2), torch.randn(1, 2, 9, 9)
    )
    quantizer.codebook[5] = 100.0
    latents = torch.randn(4, 2, 5, 5)
    before, codes = quantizer.codebook.clone(), quantizer(latents).codes

    absorbed(quantizer, latents)

    vectors = latents.permute(0, 2, 3, 1)
    for entry in range(6):
        chosen = vectors[codes == entry]
        expected = chosen.mean(0) if len(chosen) else before[entry]
        torch.testing.assert_close(quantizer.codebook[entry], expected, rtol=1e-5, atol=1e-6)


def test_moving_averages_follow_equation_three():
    """A chosen entry is the sum divided by the smoothed count, both moving averages; the others stay."""
    config = QuantizerConfig(decay=0.9, epsilon=1e-3, revive_every=0)
    quantizer = absorbed(Quantizer(config, entries=4, dim=2), torch.randn(2, 2, 4, 4))
    before, counts, vectors = quantizer.codebook.clone(), quantizer.counts.clone(), quantizer.vectors.clone()
    sums = quantizer(torch.randn(2, 2, 4, 4)).sums

    quantizer.absorb(sums)

    counts = 0.9 * counts + 0.1 * sums.counts
    vectors = 0.9 * vectors + 0.1 * sums.vectors
    smoothed = (counts + 1e-3) / (counts.sum() + 4 * 1e-3) * counts.sum()
    chosen = sums.counts > 0
    assert 0 < chosen.sum() < 4
    torch.testing.assert_close(quantizer.codebook[chosen], (vectors / smoothed[:, None])[chosen])
    assert torch.equal(quantizer.codebook[~chosen], before[~chosen])


def test_first_batch_places_entries_on_distinct_vectors():
    """After one step the entries are distinct latents of the batch, so no entry starts dead."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=32, dim=4), latents := torch.randn(2, 4, 5, 5) * 7)
    vectors = {tuple(vector) for vector in latents.permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
    entries = {tuple(entry) for entry in quantizer.codebook.tolist()}
    assert entries <= vectors
    assert len(entries) == 32


def test_entry_that_is_not_chosen_stays_bounded():
    """Without revival this holds for thousands of steps."""
    quantizer = absorbed(Quantizer(QuantizerConfig(revive_every=0), entries=4, dim=2), torch.randn(2, 2, 4, 4))
    absorbed(quantizer, torch.full((2, 2, 4, 4), 3.0), steps=3000)
    assert quantizer.codebook.abs().max() < 5
    assert quantizer.codebook.isfinite().all()


def test_entry_that_is_not_chosen_does_not_move():
    """It is exactly the same after 10,000 steps; when it is chosen it moves to its vectors."""
    quantizer = absorbed(Quantizer(QuantizerConfig(revive_every=0), entries=4, dim=2), torch.randn(2, 2, 4, 4))
    quantizer.codebook[3] = torch.tensor([30.0, -40.0])
    quantizer.vectors[3] = quantizer.codebook[3] * quantizer.counts[3]

    sums = quantizer(torch.randn(2, 2, 4, 4)).sums
    for _ in range(10_000):
        quantizer.absorb(sums)
    assert quantizer.codebook[3].tolist() == [30.0, -40.0]
    assert not quantizer.window.any()  # unused without revival, so it must not grow until float32 loses precision

    absorbed(quantizer, near := torch.tensor([29.0, -41.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(quantizer.codebook[3], near.flatten(), rtol=2e-3, atol=0)


def test_only_dead_entries_are_revived_and_only_when_due():
    """At the step that is due, entries below the threshold move to candidates of that batch."""
    quantizer = absorbed(Quantizer(QuantizerConfig(revive_every=4, decay=0.5), 4, 2), torch.randn(2, 2, 4, 4))
    quantizer.codebook[3] = 1000.0
    quantizer.vectors[3] = 1000.0 * quantizer.counts[3]
    latents = torch.randn(2, 2, 4, 4)
    for step in (1, 2):
        quantizer.absorb(quantizer(latents, BatchSlice(0, step, 0, 2)).sums)
        assert quantizer.codebook[3].norm() > 100
    alive = quantizer(latents).codes.unique()
    quantizer.window[:3] += 1  # entry 3 was chosen before it was moved away
    quantizer.window[3] = 0

    quantizer.absorb(sums := quantizer(latents, BatchSlice(0, 3, 0, 2)).sums)

    assert 3 not in alive
    assert torch.equal(quantizer.codebook[3], sums.candidates[3])
    assert not any(torch.equal(quantizer.codebook[entry], sums.candidates[entry]) for entry in range(3))
    assert not quantizer.window.any()


@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_at_least_one_entry_per_cluster_is_used(deviation: float):
    """Of 512 entries, 256 or more are used after 300 steps on 256 clusters, at either scale."""
    quantizer = Quantizer(QuantizerConfig(), entries=512, dim=64)
    clusters = torch.randn(256, 64) * deviation
    used = torch.zeros(512)
    for step in range(300):
        vectors = clusters[torch.randint(256, (2048,))] + 0.1 * deviation * torch.randn(2048, 64)
        sums = quantizer(vectors.reshape(8, 16, 16, 64).permute(0, 3, 1, 2), BatchSlice(0, step, 0, 8)).sums
        quantizer.absorb(sums)
        if step >= 280:
            used += sums.counts
    assert (used > 0).sum() >= 256


def test_sums_of_workers_add_up_to_those_of_the_global_batch():
    """The sums of 1, 4 and 2 images add up to those of all 7; counts and candidates are exact."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=16, dim=4), torch.randn(7, 4, 3, 5))
    latents = torch.randn(7, 4, 3, 5)

    expected = quantizer(latents, BatchSlice(seed=9, step=3, start=0, total=7)).sums
    starts = (0, 1, 5)
    worker_sums = [
        quantizer(worker_latents, BatchSlice(seed=9, step=3, start=start, total=7)).sums
        for start, worker_latents in zip(starts, latents.split([1, 4, 2]), strict=True)
    ]
    total = CodebookSums(*(sum(tensors) for tensors in zip(*worker_sums, strict=True)))

    assert torch.equal(total.counts, expected.counts)
    assert torch.equal(total.candidates, expected.candidates)
    torch.testing.assert_close(total.vectors, expected.vectors)


def test_candidates_change_with_seed_step_and_level():
    """Candidates differ if any one of them differs, and are equal if all are equal."""

    def candidates(level: int, seed: int, step: int) -> Tensor:
        torch.manual_seed(1)
        quantizer = Quantizer(QuantizerConfig(), entries=16, dim=4, level=level)
        return quantizer(torch.randn(4, 4, 8, 8), BatchSlice(seed, step, 0, 4)).sums.candidates

    draws = [candidates(*which) for which in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**40, 0))]
    assert torch.equal(draws[0], candidates(0, 0, 0))
    assert len({tuple(draw.flatten().tolist()) for draw in draws[:4]}) == 4


def test_each_term_of_equation_two_has_gradients_to_one_side():
    """In mode `loss` the codebook term moves only entries, the commitment term only latents."""
    quantizer = Quantizer(QuantizerConfig(mode="loss"), entries=8, dim=4)
    absorbed(quantizer, torch.randn(2, 4, 3, 5))
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized = quantizer(latents)
    entries = quantizer.lookup(quantized.codes).detach()

    to_latents, to_entries = torch.autograd.grad(
        quantized.commitment, [latents, quantizer.codebook], retain_graph=True, allow_unused=True
    )
    assert to_entries is None
    torch.testing.assert_close(to_latents, 2 * (latents - entries).detach() / latents.numel())

    to_latents, to_entries = torch.autograd.grad(quantized.codebook, [latents, quantizer.codebook], allow_unused=True)
    assert to_latents is None
    chosen = F.one_hot(quantized.codes, 8).float().flatten(0, 2)
    differences = (entries - latents.detach()).permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(to_entries, 2 * chosen.T @ differences / latents.numel())


def test_mode_ema_has_no_parameter():
    """The quantizer has no parameter, and the codebook term is 0."""
    quantizer = Quantizer(QuantizerConfig(), entries=8, dim=4)
    assert not list(quantizer.parameters())
    assert quantizer(torch.randn(2, 4, 3, 5)).codebook == 0


def test_mode_none_returns_the_latents():
    """Latents stay continuous, codes are zero, and there is no state."""
    quantizer = Quantizer(QuantizerConfig(mode="none"), entries=8, dim=4)
    quantized = quantizer(latents := torch.randn(2, 4, 3, 5))
    quantizer.absorb(quantized.sums)
    assert torch.equal(quantized.latents, latents)
    assert quantized.codes.shape == (2, 3, 5)
    assert quantized.commitment == 0
    assert not quantizer.lookup(quantized.codes).any()
    assert not quantizer.state_dict()


@pytest.mark.parametrize("mode", ["ema", "loss"])
def test_restored_quantizer_continues_exactly(mode: str):
    """Restoring the state dict before every step leads to the same codebook as an uninterrupted run."""
    config = QuantizerConfig(mode=mode, revive_every=3)
    batches = torch.randn(10, 2, 4, 3, 5)
    uninterrupted = Quantizer(config, entries=8, dim=4)
    restored = Quantizer(config, entries=8, dim=4)
    restored.load_state_dict(uninterrupted.state_dict())
    for step, batch in enumerate(batches):
        resumed = Quantizer(config, entries=8, dim=4)
        resumed.load_state_dict(restored.state_dict())
        restored = resumed
        for quantizer in (uninterrupted, restored):
            quantizer.absorb(quantizer(batch, BatchSlice(0, step, 0, 2)).sums)
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in uninterrupted.state_dict().items())


def test_quantizer_runs_in_float32_under_autocast():
    """Under bf16 autocast, codes, losses and sums equal those of the same numbers in float32."""
    quantizer = absorbed(Quantizer(QuantizerConfig(), entries=64, dim=16), torch.randn(4, 16, 6, 6))
    latents = torch.randn(4, 16, 6, 6).bfloat16()

    plain = quantizer(latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(latents)

    assert torch.equal(cast.codes, plain.codes)
    assert torch.equal(cast.commitment, plain.commitment)
    for cast_sum, plain_sum in zip(cast.sums, plain.sums, strict=True):
        assert cast_sum.dtype == torch.float32
        assert torch.equal(cast_sum, plain_sum)


def test_codes_outside_the_codebook_are_refused():
    """The error has the valid range, the codebook's size and the range of the codes."""
    quantizer = Quantizer(QuantizerConfig(), entries=8, dim=4)
    with pytest.raises(ValueError, match=r"codes must be 0 to 7, as the codebook has 8 entries, got -1 to 8"):
        quantizer.lookup(torch.tensor([[[-1, 8]]]))


def test_perplexity_is_the_number_of_entries_in_even_use():
    """It is n for even use of n entries and 1 for one entry; unused entries do not matter."""
    assert perplexity(torch.tensor([5, 5, 5, 5, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert perplexity(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


LATENTS_SEED, STEPS, IMAGES = 7, 12, 5


def global_batch(step: int) -> Tensor:
    """Return the same images in every process. The last batch is smaller."""
    generator = torch.Generator().manual_seed(LATENTS_SEED + step)
    return torch.randn(IMAGES if step < STEPS - 1 else 3, 4, 6, 5, generator=generator)


def train_worker(rank: int, folder: Path) -> None:
    """Train a codebook on this worker's slice of unequal size. Only worker 0 runs an extra forward pass."""
    torch.manual_seed(3)
    quantizer = Quantizer(QuantizerConfig(revive_every=5, revive_below=0.5, decay=0.9), entries=16, dim=4)
    for step in range(STEPS):
        batch = global_batch(step)
        images = slice(0, 2) if rank == 0 else slice(2, len(batch))
        sums = quantizer(batch[images], BatchSlice(seed=1, step=step, start=images.start, total=len(batch))).sums
        for tensor in sums:
            distributed.all_reduce(tensor)
        quantizer.absorb(sums)
        if rank == 0:
            quantizer(batch)
    save_file(quantizer.state_dict(), folder / f"{rank}.safetensors")


def test_two_workers_learn_the_codebook_of_one(tmp_path: Path):
    """Two gloo workers with unequal slices and revivals agree exactly, and with one worker to 1e-6."""
    run_ranks(train_worker, tmp_path, world_size=2)
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))

    torch.manual_seed(3)
    single = Quantizer(QuantizerConfig(revive_every=5, revive_below=0.5, decay=0.9), entries=16, dim=4)
    revived = 0
    for step in range(STEPS):
        batch = global_batch(step)
        sums = single(batch, BatchSlice(seed=1, step=step, start=0, total=len(batch))).sums
        single.absorb(sums)
        revived += int((single.codebook == sums.candidates).all(1).sum()) if step else 0

    assert revived > 0
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(left[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["ema", "loss"])
def test_random_initial_entries_stay_where_they_are(mode: str):
    """The first batch does not place them: only entries that it chooses move, by moving averages."""
    quantizer = Quantizer(QuantizerConfig(mode=mode, initial="random", revive_every=0), entries=8, dim=4)
    before = quantizer.codebook.detach().clone()
    sums = quantizer(torch.randn(2, 4, 3, 3)).sums
    quantizer.absorb(sums)
    moved = (quantizer.codebook.detach() != before).any(1)
    assert torch.equal(moved, (sums.counts > 0) if mode == "ema" else torch.zeros(8, dtype=torch.bool))
