"""The localisation network: image -> raw transform parameters at the anchors."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_apvit.deterministic import grid_sample, resize
from timm_apvit.layers import Linear, ScaleKeeping, ZeroLinear, conv_norm_act


class Localizer(ScaleKeeping):
    """Localisation network: ``(B, C, H, W)`` and N anchors -> raw parameters ``(B, N, width)`` by field name.

    `look` at the image once, then predict (`forward`) at any anchors.

    Follows Spatial Transformer Networks (Jaderberg et al. 2015, section 3.1), shared over the patches: the image is
    resized to a fixed side with anti-aliasing (so that the cost does not grow with the image), a strided stem
    extracts features, a context branch condenses the whole image into one vector (so that a patch can react to what
    is far from it), and a small MLP reads both at each anchor. No weight knows N or the image size. The last layers
    are zero: the identity transform.

    Args:
        fields: name -> width; each has its own last layer, so that a checkpoint says what it predicts.
        in_chans: image channels C.
        side: pixels along the side of the resized image, a multiple of 16.
        width: channels of the features.
        context: width of the context vector.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        fields: dict[str, int],
        in_chans: int = 3,
        side: int = 64,
        width: int = 64,
        context: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {'device': device, 'dtype': dtype}
        self.side = side
        self.width = width
        self.stem = nn.Sequential(
            conv_norm_act(in_chans, width // 2, 2, factory),
            conv_norm_act(width // 2, width, 2, factory),
            conv_norm_act(width, width, 1, factory),
        )
        self.context = nn.Sequential(
            conv_norm_act(width, width, 2, factory),
            conv_norm_act(width, width, 2, factory),
            nn.Flatten(),
            Linear(width * (side // 16) ** 2, context, **factory),
            nn.GELU(),
        )
        self.from_feature = Linear(width, width, **factory)
        self.from_context = Linear(context, width, bias=False, **factory)
        self.from_anchor = Linear(4, width, bias=False, **factory)
        self.mlp = nn.Sequential(nn.GELU(), Linear(width, width, **factory), nn.GELU())
        self.fields = nn.ModuleDict({name: ZeroLinear(width, n, **factory) for name, n in fields.items()})
        self.init_weights()

    def level(self, image_size: tuple[int, int]) -> int:
        """The coarsest level of the pyramid of an image ``(H, W)`` that is no smaller than what is looked at."""
        level, shorter = 0, min(image_size[0], image_size[1])
        while shorter >= 2 * self.side:
            level, shorter = level + 1, (shorter + 1) // 2
        return level

    def look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Look at ``(B, C, H, W)``: features ``(B, D, side / 4, side / 4)`` and context ``(B, 1, D)``."""
        # At least float32, also in half precision: where patches lie must not be rounded.
        dtype = torch.promote_types(self.from_feature.weight.dtype, torch.float32)
        small = resize(image.float(), [self.side, self.side], 'bilinear')
        features = self.stem(small.to(dtype))
        return features, self.from_context(self.context(features)).unsqueeze(1)

    def forward(
        self, features: Tensor, context: Tensor, anchor_centres: Tensor, anchor_extents: Tensor
    ) -> dict[str, Tensor]:
        """Predict raw parameters from what `look` saw.

        Args:
            features: ``(B, D, h, w)``.
            context: ``(B, 1, D)``.
            anchor_centres: (x, y), ``(N, 2)`` or ``(B, N, 2)``.
            anchor_extents: half-extents, of the same shape.

        Returns:
            Field name -> ``(B, N, width of the field)``, float32.
        """
        dtype = features.dtype
        grid = anchor_centres.expand(features.shape[0], -1, -1).unsqueeze(1)
        at_anchors = grid_sample(features.float(), grid)
        at_anchors = at_anchors.squeeze(2).transpose(1, 2).to(dtype)  # (B, N, D)
        place = torch.cat([anchor_centres, torch.log(anchor_extents)], dim=-1).to(dtype)
        hidden = self.mlp(self.from_feature(at_anchors) + context + self.from_anchor(place))
        parameters: dict[str, Tensor] = {}
        for name, layer in self.fields.items():
            parameters[name] = layer(hidden).float()
        return parameters
