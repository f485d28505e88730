"""The chain rule for a chain whose steps were differentiated all at once, each from a detached latent."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddvi.fusing import fusible


class Linked(torch.autograd.Function):
    """Steps that were taken from detached latents, put together to a chain.

    Step t went from z_t to z_{t-1} and was scored s_t, with ∂z_{t-1}/∂z_t and ∂s_t/∂z_t known. Backwards, what a loss
    wants of z_{t-1} and s_t is handed on to z_t, from t = 1 up, and to the parameters of each step.
    """

    @staticmethod
    def forward(ctx: Any, path: Tensor, scores: Tensor, jacobian: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Path (1 + T, *, D), scores (T, *), jacobian (D, T, *, D) with z_{t-1}'s entry first, slope (T, *, D)."""
        ctx.save_for_backward(jacobian, slope)
        ctx.context = copy_context()  # on a GPU another thread goes backward, which knows of no block
        return path.clone(), scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        jacobian, slope = ctx.saved_tensors
        path, scores = grads
        return ctx.context.run(_handed_on, path, scores, jacobian, slope), scores, None, None


@fusible
def _handed_on(wanted_path: Tensor, wanted_scores: Tensor, jacobian: Tensor, slope: Tensor) -> Tensor:
    """What the whole chain wants of each latent, (1 + T, *, D)."""
    wanted = list(wanted_path.unbind(0))
    direct = torch.addcmul(wanted_path[1:], wanted_scores.unsqueeze(-1), slope)
    for t, (rows, own) in enumerate(zip(jacobian.unbind(1), direct.unbind(0), strict=True), start=1):
        wanted[t] = own + (rows * wanted[t - 1].movedim(-1, 0).unsqueeze(-1)).sum(0)
    return torch.stack(wanted)
