"""What a loss is multiplied by before its backward pass in fp16, whose numbers end at 65,504 and at 6e-8.

Invariant: the scale is a power of two, so that dividing it out of the gradients again leaves no trace but in numbers
that fp16 could not hold. Formats with fp32's exponents (bf16) need none: there it stays 1.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; the constants are those of
`torch.amp.GradScaler`, which multiplies the mean of a batch where we have the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST = 2.0**5
"""GradScaler's first scale, 2**16, over the 2,048 targets of a batch whose loss is their sum."""
GROWTH_STEPS = 2000
"""Steps in a row without an overflow after which twice the scale is tried."""
MIN_SCALE, MAX_SCALE = 2.0**-14, 2.0**15
"""Below the first an overflow is none that a scale could mend; above the last the gradient of a logit is one itself."""


@dataclass(frozen=True)
class LossScale:
    """The scale of the next step; kept in the checkpoint."""

    value: float = FIRST
    n_steps: int = 0
    """Steps since it last changed, none of which overflowed."""

    def after(self, overflowed: bool) -> LossScale:
        """The scale of the step that follows one."""
        if overflowed:
            return LossScale(self.value / 2)
        if self.n_steps + 1 < GROWTH_STEPS:
            return replace(self, n_steps=self.n_steps + 1)
        return LossScale(min(MAX_SCALE, self.value * 2))

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be due to the scale alone."""
        return self.value > MIN_SCALE
