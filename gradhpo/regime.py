"""`Regime`: where a state of a problem stands: rough, noisy, at a minimum; and what follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Regime"]

SMOOTH = 0.5
"""The mean metasmoothness below which training is chaotic along the hypergradient."""
COSINE = 0.9
"""What the mean of enough estimates should have to that of all."""
KEPT = (0.8, 1.25)
"""The share of the promised fall that a step gets where the hypergradient is of use."""
FALLING = 0.02
"""The share of itself that the training loss loses on the walks, from which it still falls."""


@dataclasses.dataclass(frozen=True)
class Regime:
    """What was found on walks of twice the horizon, along the exact hypergradient."""

    step: float
    """h, how far λ was moved: that of its coordinate which moved farthest."""
    smoothness: np.ndarray
    """Metasmoothness after 1, 2, … 2T inner steps, `(samples, 2T)`: see `gradhpo.roughness`."""
    val_losses: np.ndarray
    """At λ, λ + hv and λ + 2hv, v downhill, after as many inner steps: `(samples, 2T, 3)`."""
    promised: np.ndarray
    """The change of the validation loss after T steps by the exact hypergradient, `(samples,)`."""
    train_losses: np.ndarray
    """Of the batches of the walk at λ, before each inner step: `(samples, 2T)`."""
    noise: float
    """Of the exact hypergradients of the walks: see `noise`; NaN for one walk."""

    @property
    def smooth_until(self) -> int:
        """The inner steps up to which the mean metasmoothness is at least `SMOOTH`."""
        smooth = np.nan_to_num(self.smoothness.mean(0)) >= SMOOTH
        return int(smooth.size if smooth.all() else np.argmin(smooth))

    @property
    def chaotic(self) -> bool:
        """Whether it gets chaotic within twice the horizon."""
        return self.smooth_until < self.smoothness.shape[1]

    @property
    def kept(self) -> float:
        """The share of the promised fall of the validation loss that a step of h gets."""
        T = self.smoothness.shape[1] // 2
        changes = self.val_losses[:, T - 1, 1] - self.val_losses[:, T - 1, 0]
        promised = self.promised.sum()
        return float(changes.sum() / promised) if promised else float("nan")

    @property
    def useful(self) -> bool:
        """Whether a step gets about what the exact hypergradient promises of it."""
        return KEPT[0] <= self.kept <= KEPT[1]

    @property
    def batches(self) -> float:
        """How many walks' mean has a cosine of `COSINE` to that of all; NaN for one walk."""
        return self.noise / (COSINE**-2 - 1)

    @property
    def falls(self) -> float:
        """The share of itself that the training loss loses from the first to the last quarter.

        0 where that is within two standard errors.
        """
        quarter = max(1, self.train_losses.shape[1] // 4)
        first, last = self.train_losses[:, :quarter], self.train_losses[:, -quarter:]
        # Differences of batches at the same place: a batch that stays is no noise.
        changes = (first - last).ravel()
        error = changes.std(ddof=1) / math.sqrt(changes.size) if changes.size > 1 else 0.0
        fallen = changes.mean() / abs(first.mean()) if first.mean() else 0.0
        return float(fallen) if changes.mean() > 2 * error else 0.0

    def advice(self, implicit: bool, alternatives: Sequence[str]) -> list[str]:
        """Return what was found and what follows, a line each.

        Args:
          implicit: whether implicit methods are compared.
          alternatives: methods that need no gradient through many steps.
        """
        found, T = self.smoothness.mean(0), self.smoothness.shape[1] // 2
        steps = sorted({1, len(found) // 2, len(found)})
        each = ", ".join(f"{found[t - 1]:.2f} after {t}" for t in steps)
        gets = f"; a step of {self.step:g} on λ gets {self.kept:.0%} of what it promises"
        gets = gets if math.isfinite(self.kept) else ""
        scale = f"(1: λ moves the weights as on a line; below {SMOOTH:g}: chaos)"
        lines = [f"Along the hypergradient: metasmoothness {each} steps {scale}{gets}."]
        k = self.smooth_until
        if self.chaotic and k < T and self.useful:
            lines.append(
                f"Beyond {k} steps the weights are chaotic, but after T = {T} the validation loss "
                "does what the hypergradient promises: it is of use."
            )
        elif self.chaotic and k < T:
            instead = "".join(f", or {name}" for name in alternatives)
            lines.append(f"Chaotic beyond {k} steps: truncate there{instead}.")
        elif self.chaotic:
            lines.append(f"Chaotic beyond {k} steps: T = {T} is below that; take no longer one.")
        if self.noise > 1:
            lines.append(f"Noise dominates: {self._more()}.")
        elif self.batches > 1:
            lines.append(f"Noise: {self._more()}.")
        if implicit and self.falls > FALLING:
            lines.append(
                f"Not at a minimum: on the walks the training loss falls by {self.falls:.0%}; "
                "implicit methods take it for one."
            )
        return lines

    def _more(self) -> str:
        varies = "over batches the exact hypergradient varies by"
        if not math.isfinite(self.noise):
            return f"{varies} more than its length; average many batches, more than were tried"
        return (
            f"{varies} {_few(self.noise)} times its squared length; average "
            f"{math.ceil(self.batches)} batches for a cosine of {COSINE}"
        )


def _few(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def noise(estimates: Sequence[np.ndarray]) -> float:
    """Return the variance of vectors over the square of their mean, both estimated unbiasedly.

    NaN for one of them or numbers that are not finite, infinite where the mean cannot be told
    from 0.
    """
    n = len(estimates)
    if n < 2:
        return float("nan")
    rows = np.stack(estimates).astype(float)
    if not np.isfinite(rows).all():
        return float("nan")
    variance = float(np.sum((rows - rows.mean(0)) ** 2) / (n - 1))
    signal = float(np.sum(rows.mean(0) ** 2)) - variance / n
    if variance == 0:
        return 0.0
    return variance / signal if signal > 0 else float("inf")
