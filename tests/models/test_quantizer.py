"""Promises of the quantizer: exact codes, sums that add up over workers, a codebook that stays alive."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn import functional as F

from models.config import QuantizerConfig
from models.quantizer import CodebookSums, Quantizer, Share, perplexity
from tests.gloo import together


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def taught(quantizer: Quantizer, latents: Tensor, steps: int = 1) -> Quantizer:
    """Let a quantizer absorb the same latents some times; the first time only places its entries."""
    for step in range(steps):
        quantizer.absorb(quantizer(latents, Share(seed=0, step=step, start=0, total=len(latents))).sums)
    return quantizer


def test_codes_are_those_of_brute_force_and_ties_go_to_the_lowest_entry():
    """On numbers fp32 computes exactly, ties included, every code is the first nearest entry."""
    quantizer = Quantizer(QuantizerConfig(), entries=96, dim=3)
    quantizer.codebook.copy_(torch.randint(-2, 3, (96, 3)).float())  # duplicates: 125 places for 96 entries
    latents = torch.randint(-5, 6, (5, 3, 30, 20)).float() / 2

    vectors = latents.permute(0, 2, 3, 1)
    distances = (vectors[..., None, :] - quantizer.codebook).square().sum(-1)

    assert torch.equal(quantizer(latents).codes, distances.argmin(-1))


def test_codes_in_blocks_are_the_codes_of_one_double_precision_search():
    """Blocks and fp32 name an entry whose true distance nothing beats beyond rounding."""
    quantizer = Quantizer(QuantizerConfig(), entries=512, dim=64)
    quantizer.codebook.normal_()
    latents = torch.randn(3, 64, 40, 40)

    codes = quantizer(latents).codes.flatten()
    distances = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.codebook.double())

    chosen = distances.gather(1, codes[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-6, atol=0)
    assert (codes == distances.argmin(1)).float().mean() > 0.999


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4])
def test_codes_are_exact_however_far_from_the_origin_the_latents_lie(offset: float):
    """An offset that all latents share, a thousandfold their spread and more, changes no code."""
    latents = torch.randn(2, 64, 32, 32) + offset
    quantizer = taught(Quantizer(QuantizerConfig(), entries=512, dim=64), latents)
    vectors, codebook = latents.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.codebook.double()
    distances = torch.cdist(vectors, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(quantizer(latents).codes.flatten(), distances.argmin(1))


def test_distances_are_measured_from_the_origin_unless_the_entries_lie_far_from_it():
    """Numbers that fp32 computes exactly stay exact: the centre is 0, or a power of two's multiple near the mean."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=64, dim=4), torch.randn(2, 4, 16, 16))
    assert not quantizer._centre().any()
    quantizer.codebook += 1000
    assert (quantizer._centre() % 0.25 == 0).all()
    assert (quantizer._centre() - quantizer.mean()).abs().max() < 1


@pytest.mark.parametrize(("entries", "dim"), [(0, 4), (8, 0), (-1, 4)])
def test_a_codebook_of_nothing_is_refused(entries: int, dim: int):
    """The sentence holds both sizes and the smallest allowed."""
    with pytest.raises(ValueError, match=f"a codebook has {entries} entries of {dim} numbers; use 1 or more of each"):
        Quantizer(QuantizerConfig(), entries, dim)


def test_latents_are_the_entries_themselves_and_gradients_pass_straight_through():
    """Quantized latents equal `lookup(codes)` to the bit, and their gradient is the input's."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=8, dim=4), torch.randn(2, 4, 3, 5))
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    weights = torch.randn(2, 4, 3, 5)

    quantized = quantizer(latents)
    (quantized.latents * weights).sum().backward()

    assert torch.equal(quantized.latents, quantizer.lookup(quantized.codes))
    assert torch.equal(latents.grad, weights)


def test_looking_changes_nothing():
    """Any number of forwards, in training or not, leaves every number of the state as it was."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=8, dim=4), torch.randn(2, 4, 3, 5))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for training in (True, False):
        quantizer.train(training)(torch.randn(2, 4, 3, 5))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_decay_zero_is_one_lloyd_step():
    """Without memory, entries move to the mean of their vectors, and those nobody chose stay."""
    quantizer = taught(
        Quantizer(QuantizerConfig(decay=0.0, revive_every=0, epsilon=1e-9), 6, 2), torch.randn(1, 2, 9, 9)
    )
    quantizer.codebook[5] = 100.0
    latents = torch.randn(4, 2, 5, 5)
    before, codes = quantizer.codebook.clone(), quantizer(latents).codes

    taught(quantizer, latents)

    vectors = latents.permute(0, 2, 3, 1)
    for entry in range(6):
        chosen = vectors[codes == entry]
        lloyd = chosen.mean(0) if len(chosen) else before[entry]
        torch.testing.assert_close(quantizer.codebook[entry], lloyd, rtol=1e-5, atol=1e-6)


def test_moving_averages_follow_equation_three():
    """Counts and sums decay; their quotient under Laplace smoothing is each picked entry, and the others stay."""
    config = QuantizerConfig(decay=0.9, epsilon=1e-3, revive_every=0)
    quantizer = taught(Quantizer(config, entries=4, dim=2), torch.randn(2, 2, 4, 4))
    before, counts, vectors = quantizer.codebook.clone(), quantizer.counts.clone(), quantizer.vectors.clone()
    sums = quantizer(torch.randn(2, 2, 4, 4)).sums

    quantizer.absorb(sums)

    counts = 0.9 * counts + 0.1 * sums.counts
    vectors = 0.9 * vectors + 0.1 * sums.vectors
    smoothed = (counts + 1e-3) / (counts.sum() + 4 * 1e-3) * counts.sum()
    picked = sums.counts > 0
    assert 0 < picked.sum() < 4
    torch.testing.assert_close(quantizer.codebook[picked], (vectors / smoothed[:, None])[picked])
    assert torch.equal(quantizer.codebook[~picked], before[~picked])


def test_the_first_batch_places_every_entry_on_a_vector_of_its_own():
    """After one step the codebook is made of distinct latents, so no entry starts dead."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=32, dim=4), latents := torch.randn(2, 4, 5, 5) * 7)
    vectors = {tuple(vector) for vector in latents.permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
    entries = {tuple(entry) for entry in quantizer.codebook.tolist()}
    assert entries <= vectors
    assert len(entries) == 32


def test_an_entry_nobody_chooses_does_not_fly_away():
    """Without revival an unpicked entry stays bounded for thousands of steps."""
    quantizer = taught(Quantizer(QuantizerConfig(revive_every=0), entries=4, dim=2), torch.randn(2, 2, 4, 4))
    taught(quantizer, torch.full((2, 2, 4, 4), 3.0), steps=3000)
    assert quantizer.codebook.abs().max() < 5
    assert quantizer.codebook.isfinite().all()


def test_an_entry_that_is_never_picked_keeps_its_place_for_10000_steps():
    """Neither decay nor smoothing moves it by a bit, and when it is picked at last it goes to its vectors."""
    quantizer = taught(Quantizer(QuantizerConfig(revive_every=0), entries=4, dim=2), torch.randn(2, 2, 4, 4))
    quantizer.codebook[3] = torch.tensor([30.0, -40.0])
    quantizer.vectors[3] = quantizer.codebook[3] * quantizer.counts[3]

    sums = quantizer(torch.randn(2, 2, 4, 4)).sums
    for _ in range(10_000):
        quantizer.absorb(sums)
    assert quantizer.codebook[3].tolist() == [30.0, -40.0]
    assert not quantizer.window.any()  # nothing reads it, so nothing is added up until fp32 could take no more

    taught(quantizer, near := torch.tensor([29.0, -41.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(quantizer.codebook[3], near.flatten(), rtol=2e-3, atol=0)


def test_dead_entries_are_revived_every_so_many_steps_and_live_ones_left_alone():
    """On the step due, and only then, entries below the threshold move onto vectors of that batch."""
    quantizer = taught(Quantizer(QuantizerConfig(revive_every=4, decay=0.5), 4, 2), torch.randn(2, 2, 4, 4))
    quantizer.codebook[3] = 1000.0
    quantizer.vectors[3] = 1000.0 * quantizer.counts[3]
    latents = torch.randn(2, 2, 4, 4)
    for step in (1, 2):
        quantizer.absorb(quantizer(latents, Share(0, step, 0, 2)).sums)
        assert quantizer.codebook[3].norm() > 100
    alive = quantizer(latents).codes.unique()
    quantizer.window[:3] += 1  # the window opened before entry 3 was thrown away
    quantizer.window[3] = 0

    quantizer.absorb(sums := quantizer(latents, Share(0, 3, 0, 2)).sums)

    assert 3 not in alive
    assert torch.equal(quantizer.codebook[3], sums.candidates[3])
    assert not any(torch.equal(quantizer.codebook[entry], sums.candidates[entry]) for entry in range(3))
    assert not quantizer.window.any()


@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_at_least_as_many_entries_live_as_there_are_clusters(deviation: float):
    """Of 512 entries, 256 or more are in use after 300 steps on 256 clusters, whatever their scale."""
    quantizer = Quantizer(QuantizerConfig(), entries=512, dim=64)
    clusters = torch.randn(256, 64) * deviation
    used = torch.zeros(512)
    for step in range(300):
        vectors = clusters[torch.randint(256, (2048,))] + 0.1 * deviation * torch.randn(2048, 64)
        sums = quantizer(vectors.reshape(8, 16, 16, 64).permute(0, 3, 1, 2), Share(0, step, 0, 8)).sums
        quantizer.absorb(sums)
        if step >= 280:
            used += sums.counts
    assert (used > 0).sum() >= 256


def test_sums_of_any_parts_are_the_sums_of_the_whole():
    """Workers with 1, 4 and 2 images together say what one with all 7 says, candidates to the bit."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=16, dim=4), torch.randn(7, 4, 3, 5))
    latents = torch.randn(7, 4, 3, 5)

    whole = quantizer(latents, Share(seed=9, step=3, start=0, total=7)).sums
    starts = (0, 1, 5)
    parts = [
        quantizer(part, Share(seed=9, step=3, start=start, total=7)).sums
        for start, part in zip(starts, latents.split([1, 4, 2]), strict=True)
    ]
    together = CodebookSums(*(sum(tensors) for tensors in zip(*parts, strict=True)))

    assert torch.equal(together.counts, whole.counts)
    assert torch.equal(together.candidates, whole.candidates)
    torch.testing.assert_close(together.vectors, whole.vectors)


def test_candidates_change_with_seed_step_and_level():
    """Two draws that differ in any one of them differ."""

    def candidates(level: int, seed: int, step: int) -> Tensor:
        torch.manual_seed(1)
        quantizer = Quantizer(QuantizerConfig(), entries=16, dim=4, level=level)
        return quantizer(torch.randn(4, 4, 8, 8), Share(seed, step, 0, 4)).sums.candidates

    draws = [candidates(*which) for which in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**40, 0))]
    assert torch.equal(draws[0], candidates(0, 0, 0))
    assert len({tuple(draw.flatten().tolist()) for draw in draws[:4]}) == 4


def test_equation_two_pulls_each_side_by_its_own_term():
    """In mode `loss` the codebook term moves only entries, the commitment term only latents."""
    quantizer = Quantizer(QuantizerConfig(mode="loss"), entries=8, dim=4)
    taught(quantizer, torch.randn(2, 4, 3, 5))
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
    picked = F.one_hot(quantized.codes, 8).float().flatten(0, 2)
    apart = (entries - latents.detach()).permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(to_entries, 2 * picked.T @ apart / latents.numel())


def test_mode_ema_trains_the_codebook_by_sums_alone():
    """No parameter, no codebook term."""
    quantizer = Quantizer(QuantizerConfig(), entries=8, dim=4)
    assert not list(quantizer.parameters())
    assert quantizer(torch.randn(2, 4, 3, 5)).codebook == 0


def test_mode_none_lets_latents_through():
    """Continuous latents come out as they went in, with nothing to learn and codes that name nothing."""
    quantizer = Quantizer(QuantizerConfig(mode="none"), entries=8, dim=4)
    quantized = quantizer(latents := torch.randn(2, 4, 3, 5))
    quantizer.absorb(quantized.sums)
    assert torch.equal(quantized.latents, latents)
    assert quantized.codes.shape == (2, 3, 5)
    assert quantized.commitment == 0
    assert not quantizer.lookup(quantized.codes).any()
    assert not quantizer.state_dict()


@pytest.mark.parametrize("mode", ["ema", "loss"])
def test_a_restored_quantizer_goes_on_to_the_bit(mode: str):
    """State saved between any two steps leads to the same codebook as never stopping."""
    config = QuantizerConfig(mode=mode, revive_every=3)
    batches = torch.randn(10, 2, 4, 3, 5)
    unbroken = Quantizer(config, entries=8, dim=4)
    broken = Quantizer(config, entries=8, dim=4)
    broken.load_state_dict(unbroken.state_dict())
    for step, batch in enumerate(batches):
        resumed = Quantizer(config, entries=8, dim=4)
        resumed.load_state_dict(broken.state_dict())
        broken = resumed
        for quantizer in (unbroken, broken):
            quantizer.absorb(quantizer(batch, Share(0, step, 0, 2)).sums)
    assert all(torch.equal(value, broken.state_dict()[name]) for name, value in unbroken.state_dict().items())


def test_autocast_leaves_quantizing_in_full_precision():
    """Under bf16 autocast codes, losses and sums are those of fp32 on the same numbers."""
    quantizer = taught(Quantizer(QuantizerConfig(), entries=64, dim=16), torch.randn(4, 16, 6, 6))
    latents = torch.randn(4, 16, 6, 6).bfloat16()

    plain = quantizer(latents.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(latents)

    assert torch.equal(cast.codes, plain.codes)
    assert torch.equal(cast.commitment, plain.commitment)
    for one, other in zip(cast.sums, plain.sums, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_codes_outside_the_codebook_are_refused_in_one_sentence():
    """The message holds the range found, the codebook's size and the range allowed."""
    quantizer = Quantizer(QuantizerConfig(), entries=8, dim=4)
    with pytest.raises(
        ValueError, match=r"codes run from -1 to 8, but the codebook has 8 entries; use codes from 0 to 7"
    ):
        quantizer.lookup(torch.tensor([[[-1, 8]]]))


def test_perplexity_counts_entries_in_even_use():
    """Even use of n entries is n, one entry is 1, and no entry's share of zero harms."""
    assert perplexity(torch.tensor([5, 5, 5, 5, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert perplexity(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


LATENTS_SEED, STEPS, IMAGES = 7, 12, 5


def global_batch(step: int) -> Tensor:
    """The same images on every worker's machine; the last batch is smaller."""
    generator = torch.Generator().manual_seed(LATENTS_SEED + step)
    return torch.randn(IMAGES if step < STEPS - 1 else 3, 4, 6, 5, generator=generator)


def work(rank: int, folder: Path) -> None:
    """Train a codebook on this worker's unequal part, with a preview that only worker 0 draws."""
    torch.manual_seed(3)
    quantizer = Quantizer(QuantizerConfig(revive_every=5, revive_below=0.5, decay=0.9), entries=16, dim=4)
    for step in range(STEPS):
        batch = global_batch(step)
        part = slice(0, 2) if rank == 0 else slice(2, len(batch))
        sums = quantizer(batch[part], Share(seed=1, step=step, start=part.start, total=len(batch))).sums
        for tensor in sums:
            distributed.all_reduce(tensor)
        quantizer.absorb(sums)
        if rank == 0:
            quantizer(batch)
    save_file(quantizer.state_dict(), folder / f"{rank}.safetensors")


def test_two_processes_learn_one_codebook(tmp_path: Path):
    """Two gloo workers with uneven parts, previews and revivals agree to the bit, and with one worker to 1e-6."""
    together(work, tmp_path, count=2)
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))

    torch.manual_seed(3)
    alone = Quantizer(QuantizerConfig(revive_every=5, revive_below=0.5, decay=0.9), entries=16, dim=4)
    revived = 0
    for step in range(STEPS):
        batch = global_batch(step)
        sums = alone(batch, Share(seed=1, step=step, start=0, total=len(batch))).sums
        alone.absorb(sums)
        revived += int((alone.codebook == sums.candidates).all(1).sum()) if step else 0

    assert revived > 0
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(left[name], value, rtol=1e-6, atol=1e-6)
