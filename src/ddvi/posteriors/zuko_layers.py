"""What is taken of zuko, whose import would switch off torch's checks of distributions in the whole process."""

from __future__ import annotations

from ddvi.drawn import unchecked

with unchecked():  # which gives them back
    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicRQSTransform

__all__ = ["MaskedAutoregressiveTransform", "MonotonicRQSTransform"]
