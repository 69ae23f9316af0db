"""A localiser of one's own, as a user would write it: patches lean towards where the image is brightest."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_apvit import Anchors, Localizer, Look, register_localizer
from timm_apvit.patching.layers import ZeroLinear


class Brightest(Localizer):
    """From the brightness under each anchor to its transform; ``window`` fixes what the anchors are laid over."""

    def __init__(
        self,
        fields: dict[str, int],
        in_chans: int = 3,
        window: list[float] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.fields = torch.nn.ModuleDict({k: ZeroLinear(2, n, device=device, dtype=dtype) for k, n in fields.items()})

    def level(self, image_size: tuple[int, int]) -> int:
        return 0

    def look(self, pyramid: list[Tensor]) -> Look:
        grey = pyramid[0].mean(dim=1, keepdim=True)
        window = None if self.window is None else grey.new_tensor([self.window]).expand(len(grey), -1)
        return Look(grey, window, saliency=grey[:, 0])

    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        centres = anchors.centres.expand(len(look.memory), -1, -1)
        seen = F.grid_sample(look.memory, centres.unsqueeze(1), align_corners=False)[:, 0, 0]  # (B, N)
        features = torch.stack([seen, seen.square()], dim=-1)
        return {name: layer(features) for name, layer in self.fields.items()}


register_localizer('brightest', Brightest)
