"""The handwritten digits that come with scikit-learn: the data of the built-in model."""

from functools import cache

import numpy as np
from PIL import Image

SIZE = 32
"""Height and width in pixels that the 8x8 originals are enlarged to."""


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,797 digits as RGB images with their labels.

    The 8x8 originals (17 grey levels) are enlarged to 32x32 by Pillow's bicubic filter, which
    clamps to the byte range. Both arrays are read-only, since callers share them.

    Returns:
        Images, uint8 of shape (1797, 32, 32, 3), and labels, int64 of shape (1797,).

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), the test
    part, as shipped by ``sklearn.datasets.load_digits``.
    """
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    grey = np.round(raw.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    big = [Image.fromarray(g).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for g in grey]
    images = np.repeat(np.stack([np.asarray(b) for b in big])[..., None], 3, axis=-1)
    labels = labels.astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels
