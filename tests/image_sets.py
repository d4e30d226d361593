"""What the tests of the data sets share."""

import numpy as np
import pytest

from images import data


def load(name, data_dir="unused"):
    """Load with defaults for what a test does not care about."""
    return data.load(str(name), data_dir=str(data_dir))


def message(name, data_dir="unused"):
    """The message of the DataError that loading must raise, which is one line."""
    with pytest.raises(data.DataError) as error:
        load(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(*splits):
    """The images as bytes with their labels, sorted."""
    return sorted((i.tobytes(), int(n)) for s in splits for i, n in zip(*s, strict=True))


def assert_same(a, b):
    """Everything but the name is equal."""
    for field in a._fields:
        x, y = getattr(a, field), getattr(b, field)
        if field in ("train", "test"):
            np.testing.assert_array_equal(x.images, y.images)
            np.testing.assert_array_equal(x.labels, y.labels)
        elif field != "name":
            assert x == y, field
