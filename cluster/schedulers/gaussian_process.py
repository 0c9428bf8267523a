"""The Gaussian process of PB2: how much a setting improves the score, and when.

`k((x, t), (x', t')) = σ²·exp(-|x - x'|²/2ℓ²)·(1 - ε)^{|t - t'|/2}` plus noise (Bogunovic et al.
2016; Parker-Holder et al. 2020, eq. 5). In time that is Matérn's kernel with ν = 1/2, of the length
`-2/log(1 - ε)`. Fitting is scikit-learn's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    Hyperparameter,
    Kernel,
    Matern,
    WhiteKernel,
)
from threadpoolctl import threadpool_limits

FORGETTING = (1e-3, 0.5)
"""Bounds of ε: how much of a generation's news is old in the next one."""


class OnColumns(Kernel):
    """Another kernel, on some of the columns."""

    def __init__(self, kernel: Any, start: int | None, stop: int | None) -> None:
        self.kernel, self.start, self.stop = kernel, start, stop

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Return the kernel of all pairs of rows, and its gradient where that is asked for."""
        part = slice(self.start, self.stop)
        other = None if Y is None else Y[:, part]
        return self.kernel(X[:, part], other, eval_gradient=eval_gradient)

    def diag(self, X: Any) -> Any:
        """Return the kernel of each row and itself."""
        return self.kernel.diag(X[:, self.start : self.stop])

    def is_stationary(self) -> Any:
        """Return whether it depends on differences alone."""
        return self.kernel.is_stationary()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments, and those of the other kernel."""
        own = {"kernel": self.kernel, "start": self.start, "stop": self.stop}
        inner = self.kernel.get_params() if deep else {}
        return {**own, **{f"kernel__{name}": value for name, value in inner.items()}}

    @property
    def hyperparameters(self) -> list[Any]:
        """Those of the other kernel."""
        return [Hyperparameter(f"kernel__{h[0]}", *h[1:]) for h in self.kernel.hyperparameters]

    @property
    def theta(self) -> Any:
        """The logarithms of what is fitted."""
        return self.kernel.theta

    @theta.setter
    def theta(self, theta: Any) -> None:
        self.kernel.theta = theta

    @property
    def bounds(self) -> Any:
        """Of the logarithms."""
        return self.kernel.bounds


def kernel() -> Any:
    """Return the kernel of rows that are settings, from 0 to 1, and the generation last."""
    settings = OnColumns(RBF(0.5, (0.05, 5.0)), None, -1)
    time = OnColumns(Matern(length_of(0.1), tuple(map(length_of, FORGETTING[::-1])), 0.5), -1, None)
    size, noise = ConstantKernel(1.0, (0.05, 20.0)), WhiteKernel(0.1, (1e-3, 2.0))
    return size * settings * time + noise


def length_of(forgetting: float) -> float:
    """Return the length in time, in generations, of `(1 - ε)^{|t - t'|/2}`."""
    return -2 / float(np.log1p(-forgetting))


def fitted(rows: np.ndarray, rewards: np.ndarray) -> Any:
    """Return the process after some rows, at the most likely lengths, variance and noise."""
    with _quiet():
        return GaussianProcessRegressor(kernel(), random_state=0).fit(rows, rewards)


def covariance(process: Any, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the posterior covariance of rewards, noise included, once `rows` will be known."""
    options: dict[str, Any] = {"optimizer": None}
    known: Any = GaussianProcessRegressor(process.kernel_, **options)
    with _quiet():
        return known.fit(rows, np.zeros(len(rows))).predict(at, return_cov=True)[1]


def noise(process: Any) -> float:
    """Return the variance of a reward around its mean."""
    return float(process.kernel_.k2.noise_level)


@contextlib.contextmanager
def single_threaded() -> Generator[None]:
    """Let linear algebra use one thread: with several, the last bits depend on their number."""
    with threadpool_limits(1):
        yield


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Say nothing of lengths that are at a bound, which is what bounds are for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
