"""The localisation network of Spatial Transformer Networks, shared over the patches: ``localizer='cnn'``."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_apvit.patching.anchors import Anchors
from timm_apvit.patching.coords import check_multiple
from timm_apvit.patching.deterministic import grid_sample, resize
from timm_apvit.patching.layers import Linear, ScaleKeeping, ZeroLinear, conv_norm_act, convert_channels
from timm_apvit.patching.localizers import Localizer, Look, coarsest_level, register_localizer

# By this name the layers that predict transforms went first; PEFT and others find a classifier by it.
FORMER_FIELDS = 'head.'


class CNNLocalizer(ScaleKeeping, Localizer):
    """Localisation network (Jaderberg et al. 2015, section 3.1), shared over the patches.

    The image is resized to a fixed side with anti-aliasing (so that the cost does not grow with the image), a strided
    stem extracts features, a context branch condenses the whole image into one vector (so that a patch can react to
    what is far from it), and a small MLP reads both at each anchor. The last layers are zero: the identity transform.
    It finds no window.

    Each field has its own last layer, so that a checkpoint says what it predicts. Arguments as for `Localizer`,
    and

    Args:
        side: pixels along the side of the resized image, a multiple of 16.
        width: channels of the features, a multiple of 16.
        context: width of the context vector.

    Raises:
        ValueError: a side or a width that is no multiple of 16.
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
        self.in_chans = in_chans
        self.side, self.width = check_multiple('side', side, 16), check_multiple('width', width, 16)
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
        """See `Localizer`."""
        return coarsest_level(image_size, (self.side, self.side))

    def look(self, pyramid: list[Tensor]) -> Look:
        """See `Localizer`; its memory is features ``(B, D, side / 4, side / 4)`` and context ``(B, 1, D)``."""
        image = pyramid[self.level((pyramid[0].shape[2], pyramid[0].shape[3]))]
        # At least float32, also in half precision: where patches lie must not be rounded.
        dtype = torch.promote_types(self.from_feature.weight.dtype, torch.float32)
        small = resize(image.float(), [self.side, self.side], 'bilinear')
        features = self.stem(small.to(dtype))
        context = self.from_context(self.context(features)).unsqueeze(1)
        return Look((features, context))

    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        """See `Localizer`."""
        features, context = look.memory
        grid = anchors.centres.expand(features.shape[0], -1, -1).unsqueeze(1)
        at_anchors = grid_sample(features.float(), grid)
        at_anchors = at_anchors.squeeze(2).transpose(1, 2).to(features.dtype)  # (B, N, D)
        place = torch.cat([anchors.centres, torch.log(anchors.extents)], dim=-1).to(features.dtype)
        hidden = self.mlp(self.from_feature(at_anchors) + context + self.from_anchor(place))
        return {name: layer(hidden).float() for name, layer in self.fields.items()}

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Also rename what was renamed, and adapt the first convolution."""
        for key in list(state_dict):
            if key.startswith(prefix + FORMER_FIELDS):
                state_dict[prefix + 'fields.' + key.removeprefix(prefix + FORMER_FIELDS)] = state_dict.pop(key)
        super().fit(state_dict, prefix)
        stem = f'{prefix}stem.0.0.weight'
        if stem in state_dict:
            state_dict[stem] = convert_channels(state_dict[stem], self.in_chans, stem)


register_localizer('cnn', CNNLocalizer)
