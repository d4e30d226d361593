"""The embedded digits, the validation split, and augmentation and normalisation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from image_sets import load, message
from images import data


def test_an_unknown_name_lists_the_known_ones():
    text = message("cifar11")
    for name in ("cifar11", "digits", "cifar10", "cifar100", "svhn", "folder:PATH"):
        assert name in text


def test_digits_are_those_of_scikit_learn():
    found = load("digits")
    assert found.classes == tuple("0123456789")
    assert [len(s.labels) for s in (found.train, found.test)] == [1437, 360]
    assert (found.pad, found.flip) == (4, False)
    for images, labels in (found.train, found.test):
        assert images.shape == (len(labels), 32, 32, 3)
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        small = images[:, ::4, ::4, :1]
        blocks = np.kron(small, np.ones((1, 4, 4, 3), np.uint8))
        np.testing.assert_array_equal(images, blocks)

    grey, labels = load_digits(return_X_y=True)
    original = [(row.tobytes(), int(n)) for row, n in zip(grey, labels, strict=True)]
    back = [
        (np.round(image[::4, ::4, 0].ravel() * (16 / 255)).tobytes(), n)
        for split in (found.train, found.test)
        for image, n in zip(split.images, split.labels.tolist(), strict=True)
    ]
    assert sorted(back) == sorted(original)
    assert found.train.images.min() == 0 and found.train.images.max() == 255
    # Stratified: a fifth of each class, to the nearest image.
    np.testing.assert_allclose(np.bincount(found.test.labels), np.bincount(labels) / 5, atol=1)


def test_statistics_are_those_of_all_training_images():
    found = load("digits")
    pixels = found.train.images / 255
    # float64 sums of 1.5 million values, rounded in another order
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize(("total", "wanted"), [(2, 1), (39, 1), (40, 2), (50000, 2500)])
def test_the_validation_split_is_of_5_percent(total, wanted):
    train, valid = data.validation_split(total, 3)
    assert len(valid) == wanted and train.dtype == valid.dtype == np.int32
    np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(total))


def test_the_validation_split_depends_on_the_seed_alone():
    first, again, other = (data.validation_split(1437, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert len(np.intersect1d(first[1], other[1])) < 20  # 3.5 expected


def test_the_validation_split_is_the_same_everywhere():
    """Fixed figures: another NumPy or another platform must choose the same images."""
    labels = load("digits").train.labels[data.validation_split(1437, 0)[1][:16]]
    assert "".join(map(str, labels)) == "1660247764871651"


class Augment(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_each_image_is_one_of_the_crops_and_all_occur(self):
        images = np.random.default_rng(0).integers(0, 256, (2000, 6, 6, 3)).astype(np.uint8)
        images[0] = 255  # black padding shows on it
        augment = self.variant(lambda key, x: data.augment(key, x, pad=2, flip=True))
        found = np.asarray(augment(jax.random.key(0), images))
        assert found.dtype == np.uint8 and found.shape == images.shape
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        counts = []
        for flip in (1, -1):
            for y in range(5):
                for x in range(5):
                    crops = padded[:, y : y + 6, x : x + 6][:, :, ::flip]
                    counts.append((found[1:] == crops[1:]).all(axis=(1, 2, 3)).sum())
        assert sum(counts) == 1999  # each image matches exactly one of the 50
        # 40 expected; 5 standard deviations of the binomial are 31
        assert min(counts) > 9 and max(counts) < 71
        assert set(np.unique(found[0])) <= {0, 255}

    @chex.variants(with_jit=True, without_jit=True)
    def test_crop_or_flip_alone(self):
        images = np.random.default_rng(1).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
        key = jax.random.key(1)
        flipped = self.variant(lambda x: data.augment(key, x, pad=0, flip=True))(images)
        same = (np.asarray(flipped) == images).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(flipped[~same], images[~same][:, :, ::-1])
        assert 10 < same.sum() < 54
        cropped = self.variant(lambda x: data.augment(key, x, pad=4, flip=False))(images)
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        for one, image in zip(np.asarray(cropped), padded, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
            assert (windows == one).all(axis=(2, 3, 4)).sum() == 1
        unchanged = self.variant(lambda x: data.augment(key, x, pad=0, flip=False))(images)
        np.testing.assert_array_equal(unchanged, images)

    @chex.variants(with_jit=True, without_jit=True)
    def test_normalise(self):
        images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
        mean, std = (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
        found = self.variant(lambda x: data.normalise(x, mean, std))(images)
        assert found.dtype == jnp.float32
        expected = (images / 255 - np.array(mean)) / np.array(std)
        # values up to 5, a few float32 roundings
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_augment_depends_on_the_key_alone_and_maps_over_keys():
    images = np.random.default_rng(2).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(2), 3)

    def augment(key):
        return data.augment(key, jnp.asarray(images), pad=4, flip=True)

    mapped = np.asarray(jax.jit(jax.vmap(augment))(keys))
    for key, one in zip(keys, mapped, strict=True):
        np.testing.assert_array_equal(augment(key), one)
    assert not (mapped[0] == mapped[1]).all()
