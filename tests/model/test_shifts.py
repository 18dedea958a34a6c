"""Shifted rows: their number, shape, range and difference from the originals."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dropserve.model import datasets
from dropserve.model.shifts import shifted


def test_images_are_rotated_made_noisy_and_inverted_within_their_range() -> None:
    x = datasets.load("digits").x[:50]
    found = shifted(x)
    assert list(found) == ["rotated", "noisy", "inverted"]
    for y in found.values():
        assert y.shape == x.shape
        assert y.dtype == np.float32
        assert y.min() >= 0
        assert y.max() <= 16
        assert not np.array_equal(y, x)
    np.testing.assert_array_equal(found["inverted"], 16 - x)


def test_an_image_is_turned_around_its_middle_and_its_channels_alike() -> None:
    x = np.zeros((1, 2, 9, 9), np.float32)
    x[..., 4, :] = 1.0  # a line from left to right
    turned = shifted(x)["rotated"]
    np.testing.assert_array_equal(turned[0, 0], turned[0, 1])
    diagonals = [np.trace(turned[0, 0]), np.trace(turned[0, 0][:, ::-1])]
    assert max(diagonals) > 3 * turned[0, 0, 4].sum()


def test_the_features_of_a_table_keep_their_scales() -> None:
    x = (np.random.default_rng(0).normal(size=(2000, 3)) * [1, 100, 0] + 7).astype(np.float32)
    found = shifted(x)
    assert list(found) == ["noisy", "shuffled", "stretched"]
    noise = found["noisy"] - x
    np.testing.assert_allclose(noise.std(axis=0), x.std(axis=0), rtol=0.1, atol=1e-5)
    np.testing.assert_array_equal(np.sort(found["shuffled"], axis=0), np.sort(x, axis=0))
    assert abs(np.corrcoef(found["shuffled"][:, 0], x[:, 0])[0, 1]) < 0.1
    np.testing.assert_allclose(
        found["stretched"].std(axis=0), 3 * x.std(axis=0), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found["stretched"].mean(axis=0), x.mean(axis=0), rtol=1e-3)


@pytest.mark.parametrize("x", [np.full((3, 2), 3e38), np.array([[-3e38], [3e38]])])
def test_the_largest_numbers_stay_numbers(x: NDArray[np.float64]) -> None:
    for y in shifted(x.astype(np.float32)).values():
        assert np.isfinite(y).all()


def test_the_seed_alone_decides() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for name, y in shifted(x, seed=1).items():
        np.testing.assert_array_equal(y, shifted(x, seed=1)[name])
    assert not np.array_equal(shifted(x, seed=1)["noisy"], shifted(x, seed=2)["noisy"])
