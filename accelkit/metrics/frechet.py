"""The Fréchet distance between two sets of features, from moments gathered batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from accelkit.errors import AccelkitError

Array: TypeAlias = NDArray[np.float64]

_TOLERANCE = 1e-5
"""Asymmetry and negative eigenvalues allowed, relative to the largest entry or eigenvalue.

A covariance computed elsewhere in float32 is off by about 1e-6; anything larger is a mistake.
"""


class Moments:
    """Running mean and covariance in float64; the memory used does not depend on ``n``.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances" (1979), in its matrix form. It sums centred
    squares, so a large common offset costs little precision.
    """

    def __init__(self) -> None:
        self._n = 0
        self._mean: Array | None = None
        self._scatter: Array | None = None  # the sum of (x - mean)(x - mean)^T

    def update(self, features: np.ndarray | Tensor) -> None:
        """Add a batch of features, real and of shape (n, d); an empty batch changes nothing.

        Raises:
            TypeError: ``features`` is neither an array nor a tensor of real numbers.
            AccelkitError: it is not two-dimensional, has another d than the batches before it,
                or holds a value that is not finite.
        """
        x = _as_float64(features)
        if x.ndim != 2 or x.shape[1] == 0:
            raise AccelkitError(
                f"features have shape {x.shape}, expected (n, d); flatten each sample's to one row"
            )
        self._check_width(x.shape[1])
        if not np.isfinite(x).all():
            bad = int((~np.isfinite(x).all(axis=1)).sum())
            raise AccelkitError(
                f"{bad} of {len(x)} feature rows hold NaN or infinity; check the images they are of"
            )
        if len(x):
            mean = x.mean(axis=0)
            centred = x - mean
            self._join(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the samples of ``other``, as if its batches had been given to this one.

        Raises:
            AccelkitError: the features of the two differ in width.
        """
        if other._mean is not None and other._scatter is not None:
            self._check_width(len(other._mean))
            self._join(other._n, other._mean, other._scatter)

    @property
    def n(self) -> int:
        """Number of samples so far."""
        return self._n

    @property
    def mean(self) -> Array:
        """The mean, float64 of shape (d,). Raises AccelkitError before the first sample."""
        if self._mean is None:
            raise AccelkitError("the mean of no samples was asked for; call update() first")
        return self._mean.copy()

    @property
    def cov(self) -> Array:
        """The unbiased covariance (divisor n - 1), float64 of shape (d, d).

        Raises AccelkitError before the second sample.
        """
        if self._scatter is None or self._n < 2:
            raise AccelkitError(
                f"the covariance of {self._n} sample(s) was asked for, it takes at least 2; "
                "call update() with more"
            )
        return self._scatter / (self._n - 1)

    def _check_width(self, width: int) -> None:
        if self._mean is not None and width != len(self._mean):
            raise AccelkitError(
                f"features are {width} wide, expected {len(self._mean)} as in earlier batches; "
                "use one extractor throughout"
            )

    def _join(self, n: int, mean: Array, scatter: Array) -> None:
        if self._mean is None or self._scatter is None:
            self._n, self._mean, self._scatter = n, mean.copy(), scatter.copy()
            return
        total = self._n + n
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self._n * n / total)
        self._mean = self._mean + delta * (n / total)
        self._n = total


@dataclass(frozen=True)
class Gaussian:
    """A mean, float64 (d,), and the symmetric root of a covariance, float64 (d, d).

    The root is most of a distance's work, so a reference that is compared with many keeps it.
    """

    mean: Array
    root: Array

    @classmethod
    def of(
        cls, mean: np.ndarray, cov: np.ndarray, names: tuple[str, str] = ("mean", "cov")
    ) -> Gaussian:
        """Return N(mean, cov).

        Args:
            mean: shape (d,).
            cov: shape (d, d), symmetric positive semi-definite; it may be singular.
            names: names of the two in error messages.

        Raises:
            AccelkitError: shapes do not fit, a value is not finite, or the covariance is
                asymmetric or indefinite by more than rounding.
        """
        m = _checked_mean(mean, names[0])
        return cls(m, _root(cov, len(m), names[1]))

    def distance(self, other: Gaussian) -> float:
        """Return the squared Fréchet distance, in the features' units squared; at least 0.

        ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)``, in float64. This is the
        FID if the moments are those of Inception features.

        Raises:
            AccelkitError: the two differ in width.

        Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions"
        (1982); Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), eq. 6.
        """
        if len(self.mean) != len(other.mean):
            raise AccelkitError(
                f"the means have {len(self.mean)} and {len(other.mean)} entries; "
                "compare features of one extractor"
            )
        # tr((S1^1/2 S2 S1^1/2)^1/2) is the sum of the singular values of S1^1/2 S2^1/2. This is
        # symmetric in the two arguments and keeps singular covariances exact, where roots of the
        # eigenvalues of the product would raise rounding errors from 1e-16 to 1e-8.
        cross = np.linalg.svd(self.root @ other.root, compute_uv=False).sum()
        spread = np.square(self.root).sum() + np.square(other.root).sum()  # tr(S) = |S^1/2|^2
        return max(0.0, float(np.square(self.mean - other.mean).sum() + spread - 2 * cross))


def _checked_mean(mean: np.ndarray, name: str) -> Array:
    m = np.asarray(mean, dtype=np.float64)
    if m.ndim != 1 or m.size == 0:
        raise AccelkitError(f"{name} has shape {m.shape}, expected (d,); pass Moments.mean")
    if not np.isfinite(m).all():
        raise AccelkitError(f"{name} holds NaN or infinity; check the features it was taken from")
    return m


def _root(cov: np.ndarray, width: int, name: str) -> Array:
    """Return the symmetric square root of a covariance, eigenvalues lost in rounding set to 0."""
    s = np.asarray(cov, dtype=np.float64)
    if s.shape != (width, width):
        raise AccelkitError(
            f"{name} has shape {s.shape}, expected {(width, width)} as its mean; pass Moments.cov"
        )
    if not np.isfinite(s).all():
        raise AccelkitError(f"{name} holds NaN or infinity; check the features it was taken from")
    if np.abs(s - s.T).max() > _TOLERANCE * np.abs(s).max():
        raise AccelkitError(f"{name} is not symmetric; pass a covariance matrix, as Moments.cov")
    values, vectors = np.linalg.eigh((s + s.T) / 2)
    largest = float(np.abs(values).max())
    if values[0] < -_TOLERANCE * largest:
        raise AccelkitError(
            f"{name} has the eigenvalue {values[0]:.3g}, expected none below 0; "
            "pass a covariance matrix, as Moments.cov"
        )
    noise = width * np.finfo(np.float64).eps * largest
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return (vectors * roots) @ vectors.T


def _as_float64(features: np.ndarray | Tensor) -> Array:
    if isinstance(features, Tensor):
        if features.is_complex():
            raise TypeError(f"features are {features.dtype}, expected real numbers")
        return features.detach().cpu().double().numpy()  # numpy knows no bfloat16
    if not isinstance(features, np.ndarray):
        raise TypeError(
            f"features are a {type(features).__name__}, expected a numpy array or a torch tensor"
        )
    if features.dtype.kind not in "fiu":
        raise TypeError(f"features are {features.dtype}, expected real numbers")
    return features.astype(np.float64)
