"""How long work takes by its size, learned from work that has ended."""

from dataclasses import dataclass

_MEMORY = 64
"""Pieces of work that the estimate remembers, roughly: an older one weighs 1/e."""
_SPREAD = 1e-3
"""Of the sizes, below which a line through them would be guessed."""


@dataclass
class Pace:
    """A line through recent work: so much for each piece, and so much for each unit of its size.

    Sums of the weights, sizes, amounts and their products; an older piece weighs less.
    """

    weight: float = 0.0
    size: float = 0.0
    amount: float = 0.0
    size_squared: float = 0.0
    product: float = 0.0

    def learn(self, size: float, amount: float) -> None:
        """Take in a piece of work that has ended."""
        new = (1.0, size, amount, size * size, size * amount)
        keep = 1 - 1 / _MEMORY
        for name, value in zip(self.__dataclass_fields__, new, strict=True):
            setattr(self, name, getattr(self, name) * keep + value)

    def of(self, size: float, pieces: int = 1) -> float:
        """Return what work of this size is expected to take, cut into `pieces`; 0: nobody knows."""
        fixed, slope = self._line()
        return fixed * pieces + slope * size

    def _line(self) -> tuple[float, float]:
        """Return what a piece takes whatever its size, and what each unit adds; none below 0."""
        if not (self.weight and self.size):
            return 0.0, 0.0
        spread = self.weight * self.size_squared - self.size**2
        proportional = (0.0, self.amount / self.size)
        if spread <= _SPREAD * self.size**2:
            return proportional
        slope = (self.weight * self.product - self.size * self.amount) / spread
        fixed = (self.amount - slope * self.size) / self.weight
        if slope < 0:
            return self.amount / self.weight, 0.0
        return (fixed, slope) if fixed >= 0 else proportional
