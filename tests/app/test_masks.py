"""Masks are a pure function of seed, row, site and pass, and Bernoulli with the site's p."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from app.masks import MaskStream
from export.bundle import DropoutSite

SEEDS = st.integers(0, 2**63 - 1)


def site(p: float, *shape: int, name: str = "s") -> DropoutSite:
    return DropoutSite(
        name=name, p=p, scaling="classic", mask_input=f"mask.{name}", mask_shape=shape, folded=True
    )


SITES = (site(0.5, 50, name="a"), site(0.1, 4, 1, 1, name="b"), site(0.9, 256, name="c"))
INPUTS = ("mask.a", "mask.b", "mask.c")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 5), st.integers(1, 20), st.integers(0, 20))
def test_fewer_passes_are_the_first_of_more(seed: int, rows: int, passes: int, more: int) -> None:
    stream = MaskStream(seed, SITES)
    few = stream.draw(range(rows), range(passes))
    many = stream.draw(range(rows), range(passes + more))
    for name in INPUTS:
        by_row = many[name].reshape(rows, passes + more, *few[name].shape[1:])
        assert np.array_equal(few[name], by_row[:, :passes].reshape(few[name].shape))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 6), st.integers(2, 12), st.data())
def test_rows_and_passes_drawn_in_pieces_are_those_drawn_at_once(
    seed: int, rows: int, passes: int, data: st.DataObject
) -> None:
    stream = MaskStream(seed, SITES)
    whole = stream.draw(range(rows), range(passes))
    row = data.draw(st.integers(0, rows - 1))
    cut = data.draw(st.integers(1, passes - 1))
    # Another stream of the same seed, drawing in another order.
    other = MaskStream(seed, SITES)
    second = other.draw(range(row, row + 1), range(cut, passes))
    first = other.draw(range(row, row + 1), range(cut))
    for name in INPUTS:
        expected = whole[name][row * passes : (row + 1) * passes]
        assert np.array_equal(np.concatenate([first[name], second[name]]), expected)


def test_the_masks_of_a_seed_are_the_same_today_and_tomorrow() -> None:
    masks = MaskStream(7, SITES).draw(range(3), range(20))
    digest = hashlib.sha256(b"".join(np.packbits(masks[name]).tobytes() for name in INPUTS))
    assert digest.hexdigest() == "ac31a7a1566adebbba8971626296bc6a3e6975e417d30c77ec682aec7811f8b4"


def test_a_unit_is_kept_by_the_16_bits_that_the_documented_counter_gives_it() -> None:
    seed, row, number, one_pass, unit = 7, 4, 1, 3, 21
    key = Cipher(algorithms.AES(seed.to_bytes(16, "big")), modes.ECB()).encryptor()
    # Site 1 has 30 units: 4 blocks of 8 a pass. Unit 21 is number 5 of the pass's block 2.
    block = 4 * one_pass + 2
    counter = row.to_bytes(4, "big") + number.to_bytes(4, "big") + block.to_bytes(8, "big")
    uniform = int(np.frombuffer(key.update(counter), "<u2")[5])
    for p in (uniform / 2**16, (uniform + 1) / 2**16):
        sites = (site(0.5, 8, name="a"), site(p, 30, name="b"))
        masks = MaskStream(seed, sites).draw(range(row, row + 1), range(one_pass, one_pass + 1))
        assert masks["mask.b"][0, unit] == (uniform >= p * 2**16)


def test_masks_have_the_shape_of_their_site_and_are_boolean() -> None:
    masks = MaskStream(0, SITES).draw(range(2), range(3))
    assert [masks[name].shape for name in INPUTS] == [(6, 50), (6, 4, 1, 1), (6, 256)]
    assert {masks[name].dtype for name in INPUTS} == {np.dtype(bool)}


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.999])
def test_the_share_of_kept_units_is_1_minus_p_within_four_standard_errors(p: float) -> None:
    kept = MaskStream(1, [site(p, 1000)]).draw(range(10), range(100))["mask.s"]
    assert abs(kept.mean() - (1 - p)) < 4 * np.sqrt(p * (1 - p) / kept.size)


def test_every_unit_has_its_share_and_units_are_independent() -> None:
    n, units = 40_000, 24
    kept = MaskStream(2, [site(0.3, units)]).draw(range(1), range(n))["mask.s"].astype(float)
    # 24 shares and 276 correlations: 4.5 standard errors leave a chance of 1 in 500 for any.
    assert (np.abs(kept.mean(axis=0) - 0.7) < 4.5 * np.sqrt(0.21 / n)).all()
    correlation = np.corrcoef(kept.T)[np.triu_indices(units, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_passes_rows_sites_and_seeds_are_independent() -> None:
    units = 40_000
    sites = (site(0.5, units, name="a"), site(0.5, units, name="b"))
    streams = [MaskStream(seed, sites).draw(range(2), range(2)) for seed in (0, 1, 2**62)]
    masks = [mask for draw in streams for name in ("mask.a", "mask.b") for mask in draw[name]]
    for one, other in combinations(masks, 2):
        # 24 masks, 276 pairs, as above.
        assert abs((one == other).mean() - 0.5) < 4.5 * np.sqrt(0.25 / units)


def test_p_0_keeps_every_unit() -> None:
    assert MaskStream(3, [site(0.0, 64)]).draw(range(4), range(64))["mask.s"].all()


def test_p_next_to_1_drops_nearly_every_unit() -> None:
    kept = MaskStream(3, [site(1 - 1e-12, 1000)]).draw(range(10), range(100))["mask.s"]
    # 16 bits a unit: one of 65,536 is kept, 15 of a million, give or take four times 3.9.
    assert kept.sum() < 15.3 + 4 * 3.9


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_any_seed_in_range_gives_masks_that_differ_by_pass(seed: int) -> None:
    masks = MaskStream(seed, [site(0.5, 256)]).draw(range(1), range(50))["mask.s"]
    assert len(np.unique(masks, axis=0)) == 50
