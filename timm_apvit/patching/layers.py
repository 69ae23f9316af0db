"""Layers of what a ViT does not have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _as(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight in the dtype of what it meets."""
    return None if weight is None else weight.to(x.dtype)


class Linear(nn.Linear):
    """Linear layer that computes in the dtype of its input, whatever that of its weights: ``(..., C)`` -> ``(..., D)``.

    These layers say where patches lie, in float32 also in a model of half precision: rounding what they compute (not
    their weights) moves patches, and moved logits by up to four times the error of the ViT's own rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight.to(x.dtype), _as(self.bias, x))


class Conv2d(nn.Conv2d):
    """Convolution that computes in the dtype of its input, see `Linear`: ``(B, C, h, w)`` -> ``(B, D, h', w')``."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        convolved: Tensor = self._conv_forward(x, self.weight.to(x.dtype), _as(self.bias, x))
        return convolved


class GroupNorm(nn.GroupNorm):
    """Group normalisation that computes in the dtype of its input, see `Linear`: ``(B, C, h, w)``, as is its result."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.group_norm(x, self.num_groups, _as(self.weight, x), _as(self.bias, x), self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that computes in the dtype of its input, see `Linear`: ``(..., C)``, as is its result."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.layer_norm(x, self.normalized_shape, _as(self.weight, x), _as(self.bias, x), self.eps)


class ZeroLinear(nn.Module):
    """`Linear` that starts at zero and that timm's ``init_weights`` leaves at zero: ``(..., C)`` -> ``(..., D)``.

    Not a subclass of `nn.Linear`, which timm re-initialises (standard deviation 0.02; Xavier in its jax mode).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.init_weights()

    def init_weights(self, needs_reset: bool = True) -> None:
        """Set the layer to zero, in every initialisation mode of timm."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    reset_parameters = init_weights  # what timm calls after to_empty

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return F.linear(x, self.weight.to(x.dtype), _as(self.bias, x))


def conv_norm_act(in_chans: int, out_chans: int, stride: int, factory: dict[str, Any]) -> nn.Sequential:
    """3 x 3 convolution, normalised per sample: batch statistics would make a sample depend on its batch."""
    return nn.Sequential(
        Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False, **factory),
        GroupNorm(8, out_chans, **factory),
        nn.GELU(),
    )


def convert_channels(weight: Tensor, in_chans: int, name: str) -> Tensor:
    """Weights of a convolution of RGB images, ``(D, 3, h, w)``, for C channels: ``(D, C, h, w)``; others as they are.

    As timm does it: their sum for one channel, or else repeated in turn, so that grey gives what it gave.

    Raises:
        ValueError: they are neither of 3 channels nor of C.
    """
    if weight.dim() != 4 or weight.shape[1] not in (3, in_chans):
        raise ValueError(f'expected {name} of 3 or {in_chans} input channels, got {list(weight.shape)}')
    if weight.shape[1] == in_chans:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-in_chans // 3), 1, 1)[:, :in_chans] * (3 / in_chans)


class ScaleKeeping(nn.Module):
    """A network whose hidden layers start so that they keep the scale of what they see, and its last ones at zero.

    Alike standing alone and in every initialisation mode of timm, whose usual standard deviation of 0.02 would shrink
    what the last layers see thirtyfold.
    """

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.GroupNorm | nn.LayerNorm | ZeroLinear):
                module.reset_parameters()

    reset_parameters = init_weights  # what timm calls after to_empty
