"""scikit-learn: PCA(whiten=True), its covariance and its whitened rows.

scikit-learn divides by n - 1, the specification by n: rows come out smaller by sqrt((n - 1) / n), which cosines do not
see. `whitening.whiten` normalises rows, so the two agree there; the raw projection is judged as it comes.
"""

from __future__ import annotations

from importlib import metadata

import numpy as np

from conformance.adapters import Implementation
from conformance.budget import Profile
from conformance.case import Unsupported


def whiten(sample: np.ndarray, x: np.ndarray, beta: float, gamma: float, k: int) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    if beta != 1 or gamma not in (0, 1):
        raise Unsupported("PCA has centred data (beta = 1) and gamma 0 or 1 only")
    fitted = PCA(n_components=k, whiten=gamma == 1, svd_solver="full").fit(sample)
    return normalize(fitted.transform(x))


def implementations() -> tuple[Implementation, ...]:
    """float64 and float32: PCA keeps the format of its input."""
    import sklearn  # noqa: F401  (an adapter that is not installed must say so when it is loaded)

    version = metadata.version("scikit-learn")
    return tuple(
        Implementation("scikit-learn", {"whitening.whiten": whiten}, Profile(d), version)
        for d in ("float64", "float32")
    )
