"""What is taken of zuko, whose import would switch off torch's checks of distributions in the whole process."""

from __future__ import annotations

from torch.distributions import Distribution

_checked = Distribution._validate_args  # torch has a setter alone

from zuko.flows import MaskedAutoregressiveTransform  # noqa: E402
from zuko.transforms import MonotonicRQSTransform  # noqa: E402

Distribution.set_default_validate_args(_checked)

__all__ = ["MaskedAutoregressiveTransform", "MonotonicRQSTransform"]
