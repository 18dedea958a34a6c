"""Masks are a pure function of seed, row, site and pass, and Bernoulli with the site's p."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dropserve.app.uncertainty import masks
from dropserve.app.uncertainty.masks import KINDS, Kind, MaskStream, StratifiedStream
from dropserve.export.bundle import DropoutSite

SEEDS = st.integers(0, 2**63 - 1)


def site(p: float, *shape: int, name: str = "s") -> DropoutSite:
    return DropoutSite(
        name=name, p=p, scaling="classic", mask_input=f"mask.{name}", mask_shape=shape, folded=True
    )


SITES = (site(0.5, 50, name="a"), site(0.1, 4, 1, 1, name="b"), site(0.9, 256, name="c"))
INPUTS = ("mask.a", "mask.b", "mask.c")


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.sampled_from(KINDS), SEEDS, st.integers(1, 5), st.integers(1, 50), st.integers(0, 50))
def test_fewer_passes_are_the_first_of_more(
    kind: Kind, seed: int, rows: int, passes: int, more: int
) -> None:
    few = masks.stream(kind, seed, SITES, passes).draw(range(rows), range(passes))
    many = masks.stream(kind, seed, SITES, passes + more).draw(range(rows), range(passes + more))
    # Up to whole replicates, of ten passes here.
    same = passes if kind == "independent" or more == 0 else passes - passes % 10
    for name in INPUTS:
        few_by_row = few[name].reshape(rows, passes, *few[name].shape[1:])
        many_by_row = many[name].reshape(rows, passes + more, *few[name].shape[1:])
        assert np.array_equal(few_by_row[:, :same], many_by_row[:, :same])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.sampled_from(KINDS), SEEDS, st.integers(1, 6), st.integers(2, 35), st.data())
def test_rows_and_passes_drawn_in_pieces_are_those_drawn_at_once(
    kind: Kind, seed: int, rows: int, passes: int, data: st.DataObject
) -> None:
    stream = masks.stream(kind, seed, SITES, passes)
    whole = stream.draw(range(rows), range(passes))
    row = data.draw(st.integers(0, rows - 1))
    cut = data.draw(st.integers(1, passes - 1))
    # Another stream of the same seed, drawing in another order.
    other = masks.stream(kind, seed, SITES, passes)
    second = other.draw(range(row, row + 1), range(cut, passes))
    first = other.draw(range(row, row + 1), range(cut))
    for name in INPUTS:
        expected = whole[name][row * passes : (row + 1) * passes]
        assert np.array_equal(np.concatenate([first[name], second[name]]), expected)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("independent", "ac31a7a1566adebbba8971626296bc6a3e6975e417d30c77ec682aec7811f8b4"),
        ("stratified", "bf9d4278690ae878e5aaed6872d706d3aa3f9479dc96a8cc8787176739b13a98"),
    ],
)
def test_the_masks_of_a_seed_are_the_same_today_and_tomorrow(kind: Kind, digest: str) -> None:
    drawn = masks.stream(kind, 7, SITES, 20).draw(range(3), range(20))
    content = b"".join(np.packbits(drawn[name]).tobytes() for name in INPUTS)
    assert hashlib.sha256(content).hexdigest() == digest


def test_a_unit_is_kept_by_the_16_bits_that_the_documented_counter_gives_it() -> None:
    seed, row, number, one_pass, unit = 7, 4, 1, 3, 21
    key = Cipher(algorithms.AES(seed.to_bytes(16, "big")), modes.ECB()).encryptor()
    # Site 1 has 30 units: 4 blocks of 8 a pass. Unit 21 is number 5 of the pass's block 2.
    block = 4 * one_pass + 2
    counter = row.to_bytes(4, "big") + number.to_bytes(4, "big") + block.to_bytes(8, "big")
    uniform = int(np.frombuffer(key.update(counter), "<u2")[5])
    for p in (uniform / 2**16, (uniform + 1) / 2**16):
        sites = (site(0.5, 8, name="a"), site(p, 30, name="b"))
        drawn = MaskStream(seed, sites).draw(range(row, row + 1), range(one_pass, one_pass + 1))
        assert drawn["mask.b"][0, unit] == (uniform >= p * 2**16)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_have_the_shape_of_their_site_and_are_boolean(kind: Kind) -> None:
    drawn = masks.stream(kind, 0, SITES, 3).draw(range(2), range(3))
    assert [drawn[name].shape for name in INPUTS] == [(6, 50), (6, 4, 1, 1), (6, 256)]
    assert {drawn[name].dtype for name in INPUTS} == {np.dtype(bool)}
    assert all(drawn[name].flags.c_contiguous for name in INPUTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.999])
def test_the_share_of_kept_units_is_1_minus_p_within_four_standard_errors(
    kind: Kind, p: float
) -> None:
    kept = masks.stream(kind, 1, [site(p, 1000)], 100).draw(range(10), range(100))["mask.s"]
    assert abs(kept.mean() - (1 - p)) < 4 * np.sqrt(p * (1 - p) / kept.size)


def test_every_unit_has_its_share_and_units_are_independent() -> None:
    n, units = 40_000, 24
    kept = MaskStream(2, [site(0.3, units)]).draw(range(1), range(n))["mask.s"].astype(float)
    # 24 shares and 276 correlations: 4.5 standard errors leave a chance of 1 in 500 for any.
    assert (np.abs(kept.mean(axis=0) - 0.7) < 4.5 * np.sqrt(0.21 / n)).all()
    correlation = np.corrcoef(kept.T)[np.triu_indices(units, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_rows_sites_and_seeds_are_independent(kind: Kind) -> None:
    units = 40_000
    sites = (site(0.5, units, name="a"), site(0.5, units, name="b"))
    drawn = []
    for seed in (0, 1, 2**62):
        stream = masks.stream(kind, seed, sites, 20)
        # Stratified masks are so from one replicate, of ten passes here, to the next.
        for one_pass in (0, 10):
            drawn.append(stream.draw(range(2), range(one_pass, one_pass + 1)))
    found = [mask for draw in drawn for name in ("mask.a", "mask.b") for mask in draw[name]]
    for one, other in combinations(found, 2):
        # 24 masks, 276 pairs, as above.
        assert abs((one == other).mean() - 0.5) < 4.5 * np.sqrt(0.25 / units)


@pytest.mark.parametrize("kind", KINDS)
def test_p_0_keeps_every_unit(kind: Kind) -> None:
    assert masks.stream(kind, 3, [site(0.0, 64)], 64).draw(range(4), range(64))["mask.s"].all()


@pytest.mark.parametrize("kind", KINDS)
def test_p_next_to_1_drops_nearly_every_unit(kind: Kind) -> None:
    kept = masks.stream(kind, 3, [site(1 - 1e-12, 1000)], 100).draw(range(10), range(100))["mask.s"]
    # 16 bits a unit: one of 65,536 is kept, 15 of a million, give or take four times 3.9.
    assert kept.sum() < 15.3 + 4 * 3.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_any_seed_in_range_gives_masks_that_differ_by_pass(kind: Kind, seed: int) -> None:
    drawn = masks.stream(kind, seed, [site(0.5, 256)], 50).draw(range(1), range(50))["mask.s"]
    assert len(np.unique(drawn, axis=0)) == 50


# Of p, the length of a replicate, and what its passes keep of a unit, one or the other.
REPLICATES = {
    0.5: (10, {5}),
    0.1: (10, {9}),
    0.05: (20, {19}),
    0.25: (12, {9}),
    1 / 3: (12, {8}),
    0.01: (20, {19, 20}),
    0.123: (16, {14, 15}),
}


@pytest.mark.parametrize("p", REPLICATES)
def test_a_replicate_keeps_each_unit_in_as_many_passes_as_it_should(p: float) -> None:
    length, counts = REPLICATES[p]
    stream = StratifiedStream(5, [site(p, 300)], 5 * length)
    assert stream.replicate == length
    kept = stream.draw(range(20), range(5 * length))["mask.s"].reshape(20, 5, length, 300)
    found = kept.sum(axis=2)
    assert set(np.unique(found)) == counts
    # Where there are two, each as often as makes it right on average.
    fraction = (1 - p) * length - min(counts)
    share = (found > min(counts)).mean()
    assert abs(share - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / found.size) + 1e-12


def test_sites_of_several_p_share_the_length_that_leaves_least() -> None:
    stream = StratifiedStream(5, [site(0.5, 40, name="a"), site(0.05, 30, name="b")], 40)
    assert stream.replicate == 20
    drawn = stream.draw(range(3), range(40))
    assert set(drawn["mask.a"].reshape(6, 20, 40).sum(axis=1).ravel()) == {10}
    assert set(drawn["mask.b"].reshape(6, 20, 30).sum(axis=1).ravel()) == {19}


@pytest.mark.parametrize("p", [0.5, 0.1, 0.05, 0.25, 0.01])
@pytest.mark.parametrize("passes", [1, 2, 7, 25, 30, 64, 113])
def test_of_any_number_of_passes_a_unit_is_kept_in_as_many_as_it_should(
    p: float, passes: int
) -> None:
    """In the next number below or above, where a replicate keeps as many as it should."""
    stream = StratifiedStream(6, [site(p, 500)], passes)
    kept = stream.draw(range(20), range(passes))["mask.s"].reshape(20, passes, 500)
    counts = kept.sum(axis=1)
    exact = (1 - p) * passes
    if p != 0.01:
        assert counts.min() >= np.floor(exact - 1e-9)
        assert counts.max() <= np.ceil(exact + 1e-9)
    # 10,000 units, and every pass on its own: right on average within four standard errors.
    assert abs(counts.mean() - exact) < 4 * np.sqrt(p * (1 - p) * passes / 10_000) + 1e-9
    shares = kept.mean(axis=(0, 2))
    assert np.abs(shares - (1 - p)).max() < 4.5 * np.sqrt(p * (1 - p) / 10_000)


@pytest.mark.parametrize("p", REPLICATES)
def test_columns_drawn_alike_keep_each_pass_with_1_minus_p_and_pairs_as_a_shuffle_does(
    p: float,
) -> None:
    length, counts = REPLICATES[p]
    columns = masks.pool(p, length)
    assert len(columns) == 2**16
    bits = (columns[:, None] >> np.arange(length)) & 1
    assert np.abs(bits.mean(axis=0) - (1 - p)).max() < 2**-15
    together = bits.T @ bits / len(bits)
    # Of k of n passes, picked at random: k (k - 1) / n (n - 1) for each pair.
    low = min(counts)
    high_share = (1 - p) * length - low
    pairs = sum(
        share * k * (k - 1) for share, k in ((1 - high_share, low), (high_share, low + 1))
    ) / (length * (length - 1))
    off = np.abs(together - pairs)[~np.eye(length, dtype=bool)]
    # Chance would leave 1 / 256 of the 65,536 columns' standard deviation; the choice is evener.
    assert off.max() < 1e-3


def test_a_stratified_pass_alone_is_an_ordinary_draw() -> None:
    """Each unit has its share in every pass, and the units of a pass are independent."""
    rows, units = 4000, 24
    stream = StratifiedStream(2, [site(0.3, units)], 10)
    kept = stream.draw(range(rows), range(10))["mask.s"].reshape(rows, 10, units)
    # 240 shares, and 2,760 correlations: 5 standard errors leave a chance of 1 in 500 for any.
    assert np.abs(kept.mean(axis=0) - 0.7).max() < 5 * np.sqrt(0.21 / rows)
    for one_pass in range(10):
        correlation = np.asarray(np.corrcoef(kept[:, one_pass].T))[np.triu_indices(units, 1)]
        assert np.abs(correlation).max() < 5 / np.sqrt(rows)


def test_the_counts_of_two_passes_of_a_replicate_are_those_of_a_shuffle() -> None:
    rows, units = 500, 400
    stream = StratifiedStream(3, [site(0.5, units)], 10)
    kept = stream.draw(range(rows), range(10))["mask.s"].reshape(rows, 10, units)
    both = (kept[:, 0] & kept[:, 7]).mean()
    # 5/10 x 4/9, where independent masks have a quarter.
    assert abs(both - 2 / 9) < 4 * np.sqrt(2 / 9 * 7 / 9 / (rows * units))


def test_units_of_a_replicate_are_independent_of_each_other() -> None:
    """Which passes keep one unit tells nothing of which keep another, at its site or the next."""
    rows = 20_000
    sites = [site(0.5, 2, name="a"), site(0.5, 1, name="b")]
    drawn = StratifiedStream(4, sites, 10).draw(range(rows), range(10))
    a = drawn["mask.a"].reshape(rows, 10, 2)
    b = drawn["mask.b"].reshape(rows, 10)
    for one, other in ((a[..., 0], a[..., 1]), (a[..., 0], b)):
        # Of the five passes that keep one, the other keeps a hypergeometric number.
        shared = np.bincount((one & other).sum(axis=1), minlength=6)
        expected = rows * stats.hypergeom(10, 5, 5).pmf(np.arange(6))
        assert stats.chisquare(shared, expected).pvalue > 1e-3
