"""Dropout masks from a counter-based generator: a seed gives the same masks everywhere.

The generator is AES-128 in counter mode (Salmon et al. 2011, Parallel Random Numbers: As Easy as
1, 2, 3). The key is the seed; the counter of a 16-byte block is

    row in its request (32 bits) | stream (32 bits) | block of the row's stream (64 bits)

and every drawn number takes 16 bits. There are two ways to turn numbers into masks.

``independent``: one stream for each site, one number for each unit and pass. A pass takes as many
whole blocks as its units need, so the first 50 of 100 passes are the same as 50. A unit is kept if
its number is at least ``p * 65536`` rounded: p is met within 2^-17.

``stratified``: passes come in replicates of equal length n, ten to twenty. Within a replicate a
unit is kept in (1-p)n of the passes. If that is not a whole number, one of the two next to it is
taken at random, right on average. This is a Latin hypercube over the n uniforms of a unit (McKay,
Beckman and Conover 1979; Stein 1987), with independent units and replicates: the main effects of
the masks on an output cancel, and only their interactions are left to chance. Left-over passes form
a shorter replicate of their own, so the first passes are the same for any number of passes, up to
whole replicates. Each pass by itself is an ordinary draw: p is met within 2^-15. One stream serves
all sites, with one number for each unit and replicate: it picks the unit's column of n bits.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from dropserve.export.bundle import DropoutSite

Kind = Literal["independent", "stratified"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BLOCK = 16  # bytes
NUMBERS_A_BLOCK = BLOCK // 2
LEVELS = 2**16
# Passes of a replicate. Short replicates give a good estimate of the standard error; at least ten,
# since the variance of interactions grows by 1 / (n - 1).
REPLICATE_PASSES = range(10, 21)


class MaskStream:
    """The independent masks of one seed, for the sites of one model.

    Parameters
    ----------
    seed
        In [0, 2^63).
    sites
        The dropout sites, in the manifest's order.
    """

    # Number of passes drawn together.
    replicate = 1

    def __init__(self, seed: int, sites: Sequence[DropoutSite]) -> None:
        self.seed = seed
        self.sites = sites
        key = seed.to_bytes(BLOCK, "big")
        self.cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK))).encryptor()

    def draw(self, rows: range, passes: range) -> dict[str, NDArray[np.bool_]]:
        """Draw the masks of some passes of some rows.

        Parameters
        ----------
        rows
            Indices of the rows in their request.
        passes
            Indices of the passes.

        Returns
        -------
        dict
            By mask input: ``[N, *mask_shape]``, N = rows x passes, the passes of a row together.
            True: the unit is kept.
        """
        return {
            site.mask_input: self.draw_site(number, site, rows, passes)
            for number, site in enumerate(self.sites)
        }

    def draw_site(
        self, number: int, site: DropoutSite, rows: range, passes: range
    ) -> NDArray[np.bool_]:
        """Draw the masks ``[N, *mask_shape]`` of one site."""
        drawn = self.numbers(number, rows, passes, math.prod(site.mask_shape))
        # For p close to 1 the threshold must stay within 16 bits.
        threshold = min(round(site.p * LEVELS), LEVELS - 1)
        kept = drawn >= threshold
        return kept.reshape(-1, *site.mask_shape)

    def numbers(self, stream: int, rows: range, turns: range, each: int) -> NDArray[np.uint16]:
        """Draw numbers ``[rows x turns, each]``, the turns of a row together."""
        blocks = -(-each // NUMBERS_A_BLOCK)
        size = len(turns) * blocks * BLOCK  # of a row's stream
        content = np.empty((len(rows), size), np.uint8)
        zeros = bytes(size)
        for place, row in enumerate(rows):
            counter = (row << 96) | (stream << 64) | (turns.start * blocks)
            self.cipher.reset_nonce(counter.to_bytes(BLOCK, "big"))
            self.cipher.update_into(zeros, content[place].data)
        return content.view("<u2").reshape(-1, blocks * NUMBERS_A_BLOCK)[:, :each]


class StratifiedStream(MaskStream):
    """The stratified masks of one seed; see the module.

    Parameters
    ----------
    seed, sites
        As in ``MaskStream``.
    passes
        Most passes, which determine the position of the shorter replicate.
    """

    def __init__(self, seed: int, sites: Sequence[DropoutSite], passes: int) -> None:
        super().__init__(seed, sites)
        self.ps = tuple(site.p for site in sites)
        self.units = tuple(math.prod(site.mask_shape) for site in sites)
        self.replicate = replicate_length(self.ps)
        # Where the shorter replicate begins, and where it ends.
        self.whole, self.passes = passes - passes % self.replicate, passes

    def draw(self, rows: range, passes: range) -> dict[str, NDArray[np.bool_]]:
        """Draw masks; see ``MaskStream.draw``."""
        if passes.stop <= self.whole:
            return self.draw_replicates(rows, passes, 0, self.replicate)
        last = range(max(passes.start, self.whole), passes.stop)
        of_last = self.draw_replicates(rows, last, self.whole, self.passes - self.whole)
        if passes.start >= self.whole:
            return of_last
        first = range(passes.start, self.whole)
        of_first = self.draw_replicates(rows, first, 0, self.replicate)
        return {
            name: np.concatenate(
                [
                    masks.reshape(len(rows), -1, *masks.shape[1:])
                    for masks in (of_first[name], of_last[name])
                ],
                axis=1,
            ).reshape(-1, *of_last[name].shape[1:])
            for name in of_last
        }

    def draw_replicates(
        self, rows: range, passes: range, start: int, length: int
    ) -> dict[str, NDArray[np.bool_]]:
        """Draw passes from replicates of one length; the first replicate begins at ``start``."""
        if not self.sites:
            return {}
        plan = planned(self.ps, self.units, length)
        before = start // self.replicate
        turns = range(
            before + (passes.start - start) // length, before - -(passes.stop - start) // length
        )
        drawn = self.numbers(0, rows, turns, plan.units)
        if len(plan.spans) == 1:
            columns = plan.spans[0][0].take(drawn)
        else:
            parts = [pool.take(drawn[:, first:end]) for pool, first, end in plan.spans]
            columns = np.concatenate(parts, axis=1)
        # Passes first: numpy is fast along long rows.
        picked = columns & plan.bits  # [n, rows x turns, units of all sites]
        whole = len(turns) * length == len(passes)
        masks = {}
        for site, (first, end) in zip(self.sites, plan.places, strict=True):
            kept = np.empty((len(columns), length, end - first), np.bool_)
            np.not_equal(picked[..., first:end].swapaxes(0, 1), 0, out=kept)
            if not whole:
                by_row = kept.reshape(len(rows), len(turns) * length, end - first)
                skipped = passes.start - start - (turns.start - before) * length
                kept = np.ascontiguousarray(by_row[:, skipped : skipped + len(passes)])
            masks[site.mask_input] = kept.reshape(-1, *site.mask_shape)
        return masks


class Plan(NamedTuple):
    """Plan for drawing replicates of n passes.

    Parameters
    ----------
    bits
        The bit of each pass, ``[n, 1, 1]``.
    units
        Number of units of all sites.
    places
        First and last unit of each site.
    spans
        Columns to draw from, with the first and last unit that draws from them; neighboring sites
        with the same p share a span.
    """

    bits: NDArray[np.unsignedinteger]
    units: int
    places: tuple[tuple[int, int], ...]
    spans: tuple[tuple[NDArray[np.unsignedinteger], int, int], ...]


@lru_cache
def planned(ps: tuple[float, ...], units: tuple[int, ...], length: int) -> Plan:
    """Plan replicates of ``length`` passes, for sites with rates ``ps`` and sizes ``units``."""
    bits = 1 << np.arange(length).reshape(-1, 1, 1)
    spans, end = [], 0
    for p, alike in groupby(zip(ps, units, strict=True), lambda pair: pair[0]):
        start, end = end, end + sum(count for _, count in alike)
        spans.append((pool(p, length), start, end))
    places = tuple(pairwise(accumulate(units, initial=0)))
    return Plan(bits.astype(column_type(length)), end, places, tuple(spans))


def stream(kind: Kind, seed: int, sites: Sequence[DropoutSite], passes: int) -> MaskStream:
    """Return the masks of a kind, for at most ``passes`` passes."""
    if kind == "stratified":
        return StratifiedStream(seed, sites, passes)
    return MaskStream(seed, sites)


@lru_cache
def replicate_length(ps: tuple[float, ...]) -> int:
    """Return the length of a replicate that leaves the least variance to rounding.

    Rounding leaves f (1-f) of the variance n p (1-p) of a unit's count, where f is the fraction of
    (1-p)n.
    """

    def left(n: int) -> float:
        return sum(rounding(p * n) / (p * (1 - p) * n) for p in set(ps) if p > 0)

    # Rounded, since a decimal fraction such as p leaves rounding errors of its own.
    return min(REPLICATE_PASSES, key=lambda n: round(left(n), 9))


def rounding(count: float) -> float:
    """Return the variance of a number rounded up or down at random, right on average."""
    fraction = count % 1
    return fraction * (1 - fraction)


@lru_cache
def pool(p: float, length: int) -> NDArray[np.unsignedinteger]:
    """Return ``LEVELS`` columns of ``length`` bits; one drawn uniformly keeps a unit with 1 - p.

    Columns with the same number of ones are spread evenly over all such columns, each with all its
    rotations, so every pass keeps the same share.
    """
    exact = (1 - p) * length
    low = math.floor(exact)
    high_columns = round((exact - low) * LEVELS)
    found = np.concatenate(
        [rotated(low, LEVELS - high_columns, length), rotated(low + 1, high_columns, length)]
    )
    return found.astype(column_type(length))


def column_type(length: int) -> type[np.uint16 | np.uint32]:
    """Return the integer type for columns of ``length`` bits."""
    return np.uint16 if length <= 16 else np.uint32


def rotated(ones: int, count: int, length: int) -> NDArray[np.uint32]:
    """Return ``count`` columns of ``length`` bits with ``ones`` ones; every bit equally often."""
    numbers = np.arange(2**length, dtype=np.uint32)
    there = numbers[np.bitwise_count(numbers) == ones]
    full, more = divmod(count, length)
    picked = there[np.arange(full) * len(there) // max(1, full)]
    around = [((picked << s) | (picked >> (length - s))) & numbers[-1] for s in range(length)]
    # Columns short of a full rotation: their ones follow each other around.
    rest = [sum(1 << (k % length) for k in range(n * ones, (n + 1) * ones)) for n in range(more)]
    return np.concatenate([*around, np.array(rest, np.uint32)])
