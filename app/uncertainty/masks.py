"""Masks from a counter-based generator: the same for a seed wherever and beside whatever they run.

The generator is AES-128 in counter mode (Salmon et al. 2011, Parallel Random Numbers: As Easy as
1, 2, 3). The key is the seed; the counter of a 16-byte block is

    row in its request (32 bits) | stream (32 bits) | block of the row's stream (64 bits)

and every drawn number takes 16 bits. There are two ways to make masks of them.

``independent``: a stream for each site, a number for each unit and pass. A pass takes the whole
blocks that its units need, so the first 50 passes are the same whether 50 or 100 are asked for. A
unit is kept where its number is at least ``p * 65536`` rounded: p is met within 2^-17.

``stratified``: passes come in replicates of equal length n, ten to twenty. Within a replicate a
unit is kept in (1-p)n of the passes: in just so many where that is a whole number, else in one of
the two numbers next to it, at random and right on average. That is what a Latin hypercube over the
n uniforms of a unit gives (McKay, Beckman and Conover 1979; Stein 1987), units and replicates
independent of each other; what the masks do to an output one by one cancels, and only what they do
in concert is left to chance. Passes that are left over make a shorter replicate of their own, so
the first passes of more are the same up to whole replicates. Every pass alone is an ordinary draw:
p is met within 2^-15. One stream serves all sites, a number for each unit and replicate: it picks
the column of n bits.
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
# Passes of a replicate. Short ones tell the standard error well; at least ten, since what masks do
# in concert grows by 1 / (n - 1).
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

    # Passes that are drawn together; each on its own.
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
            Places of the rows in their request.
        passes
            Numbers of the passes.

        Returns
        -------
        dict
            By mask input: ``[N, *mask_shape]``, N = rows x passes, the passes of a row together;
            True where a unit is kept.
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
        # With p next to 1 the threshold would be out of reach of 16 bits.
        threshold = min(round(site.p * LEVELS), LEVELS - 1)
        kept = drawn >= threshold
        return kept.reshape(-1, *site.mask_shape)

    def numbers(self, stream: int, rows: range, turns: range, each: int) -> NDArray[np.uint16]:
        """Draw ``each`` numbers in each turn: ``[rows x turns, each]``, a row's turns together."""
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
    """The stratified masks of some passes; see the module.

    Parameters
    ----------
    seed, sites
        As of a ``MaskStream``.
    passes
        How many there are at most, which settles where a shorter replicate stands.
    """

    def __init__(self, seed: int, sites: Sequence[DropoutSite], passes: int) -> None:
        super().__init__(seed, sites)
        self.ps = tuple(site.p for site in sites)
        self.units = tuple(math.prod(site.mask_shape) for site in sites)
        self.replicate = replicate_length(self.ps)
        # Where the shorter replicate begins and ends.
        self.whole, self.passes = passes - passes % self.replicate, passes

    def draw(self, rows: range, passes: range) -> dict[str, NDArray[np.bool_]]:
        """Draw the masks of some passes of some rows; see ``MaskStream.draw``."""
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
        """Draw passes of replicates of some ``length``, the first of which is at pass ``start``."""
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
        # Pass by pass, as numpy is fast along long rows.
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
    """How replicates of n passes of some sites are drawn.

    Parameters
    ----------
    bits
        The bit of each pass, ``[n, 1, 1]``.
    units
        Of all sites.
    places
        Where the units of each site begin and end among them.
    spans
        The columns to draw from, and where the units begin and end that draw from them:
        neighbouring sites of the same p together.
    """

    bits: NDArray[np.unsignedinteger]
    units: int
    places: tuple[tuple[int, int], ...]
    spans: tuple[tuple[NDArray[np.unsignedinteger], int, int], ...]


@lru_cache
def planned(ps: tuple[float, ...], units: tuple[int, ...], length: int) -> Plan:
    """Plan replicates of so many passes, of sites of some ``ps`` and ``units``."""
    bits = 1 << np.arange(length).reshape(-1, 1, 1)
    spans, end = [], 0
    for p, alike in groupby(zip(ps, units, strict=True), lambda pair: pair[0]):
        start, end = end, end + sum(count for _, count in alike)
        spans.append((pool(p, length), start, end))
    places = tuple(pairwise(accumulate(units, initial=0)))
    return Plan(bits.astype(column_type(length)), end, places, tuple(spans))


def stream(kind: Kind, seed: int, sites: Sequence[DropoutSite], passes: int) -> MaskStream:
    """Return the masks of a kind, of so many passes at most."""
    if kind == "stratified":
        return StratifiedStream(seed, sites, passes)
    return MaskStream(seed, sites)


@lru_cache
def replicate_length(ps: tuple[float, ...]) -> int:
    """Return the length of a replicate for which as little as can be is left to rounding.

    What is left of the variance of a unit's count, n p (1-p), is f (1-f) where f is the fraction of
    (1-p) n.
    """

    def left(n: int) -> float:
        return sum(rounding(p * n) / (p * (1 - p) * n) for p in set(ps) if p > 0)

    # As decimal fractions of which p is one leave nothing but rounding of their own.
    return min(REPLICATE_PASSES, key=lambda n: round(left(n), 9))


def rounding(count: float) -> float:
    """Return the variance of a number that is rounded up or down at random, right on average."""
    fraction = count % 1
    return fraction * (1 - fraction)


@lru_cache
def pool(p: float, length: int) -> NDArray[np.unsignedinteger]:
    """Return ``LEVELS`` columns of ``length`` bits, which drawn alike keep a unit with 1 - p.

    Columns with the same number of bits are of all such columns every so-many-th, each with all its
    rotations: so every pass keeps the same share.
    """
    exact = (1 - p) * length
    low = math.floor(exact)
    high_columns = round((exact - low) * LEVELS)
    found = np.concatenate(
        [rotated(low, LEVELS - high_columns, length), rotated(low + 1, high_columns, length)]
    )
    return found.astype(column_type(length))


def column_type(length: int) -> type[np.uint16 | np.uint32]:
    """Return what holds so many bits."""
    return np.uint16 if length <= 16 else np.uint32


def rotated(ones: int, count: int, length: int) -> NDArray[np.uint32]:
    """Return ``count`` columns of ``length`` bits, so many of them ones; all bits alike often."""
    numbers = np.arange(2**length, dtype=np.uint32)
    there = numbers[np.bitwise_count(numbers) == ones]
    full, more = divmod(count, length)
    picked = there[np.arange(full) * len(there) // max(1, full)]
    around = [((picked << s) | (picked >> (length - s))) & numbers[-1] for s in range(length)]
    # The ones of those that make no full turn follow each other, round and round.
    rest = [sum(1 << (k % length) for k in range(n * ones, (n + 1) * ones)) for n in range(more)]
    return np.concatenate([*around, np.array(rest, np.uint32)])
