"""Masks from a counter-based generator: the same for a seed wherever and beside whatever they run.

The generator is AES-128 in counter mode (Salmon et al. 2011, Parallel Random Numbers: As Easy as
1, 2, 3). The key is the seed; the counter of a 16-byte block is

    row in its request (32 bits) | site (32 bits) | block of the row's stream at the site (64 bits)

and a pass takes the whole blocks that its units need, 16 bits a unit, so the first 50 passes are
the same whether 50 or 100 are asked for. A unit is kept where its 16 bits, read as a number, are
at least ``p * 65536`` rounded: p is met within 2^-17.
"""

import math
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from export.bundle import DropoutSite

BLOCK = 16  # bytes
UNITS_A_BLOCK = BLOCK // 2
LEVELS = 2**16


class MaskStream:
    """The masks of one seed, for the sites of one model.

    Parameters
    ----------
    seed
        In [0, 2^63).
    sites
        The dropout sites, in the manifest's order.
    """

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
        units = math.prod(site.mask_shape)
        blocks = -(-units // UNITS_A_BLOCK)
        size = len(passes) * blocks * BLOCK  # of a row's stream
        stream = np.empty((len(rows), size), np.uint8)
        zeros = bytes(size)
        for place, row in enumerate(rows):
            counter = (row << 96) | (number << 64) | (passes.start * blocks)
            self.cipher.reset_nonce(counter.to_bytes(BLOCK, "big"))
            self.cipher.update_into(zeros, stream[place].data)
        uniform = stream.view("<u2").reshape(len(rows) * len(passes), blocks * UNITS_A_BLOCK)
        # With p next to 1 the threshold would be out of reach of 16 bits.
        threshold = min(round(site.p * LEVELS), LEVELS - 1)
        kept = uniform[:, :units] >= threshold
        return kept.reshape(-1, *site.mask_shape)
