"""Where it matters, by a small network that masks or boxes teach: ``localizer='saliency'``."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_apvit.patching.anchors import Anchors
from timm_apvit.patching.coords import check_count, check_number
from timm_apvit.patching.deterministic import grid_sample, resize
from timm_apvit.patching.layers import Linear, ScaleKeeping, ZeroLinear, conv_norm_act, convert_channels
from timm_apvit.patching.localizers import MOST_CROWD, Localizer, Look, register_localizer

# Pixels along the side of the coarsest cells.
COARSEST = 32
# Larger images take longer, and more memory, than anyone means them to.
MOST_SIDE = 2048


class SaliencyLocalizer(ScaleKeeping, Localizer):
    """How much each place matters, by a feature pyramid network; the patches crowd there, and find no window.

    Convolutions read the image at strides of 2 to 32, the coarse ones are added to the finer (Lin et al. 2017,
    https://arxiv.org/abs/1612.03144), and there is a logit for every 8 x 8 pixels. At 224 pixels and a width of 32 it
    takes 83 million multiply-adds, 2 % of a ViT-S/16 with 196 patches.

    Nothing but `timm_apvit.learning.saliency.saliency_loss` teaches what matters. The last layers are zero: all places
    matter alike, and patches are the grid.

    Args:
        fields: as for `Localizer`.
        in_chans: image channels C.
        side: pixels along the side of the resized image, a multiple of 32; of one that is not square the side of a
            square with about as many.
        width: of the features at a stride of 4, a multiple of 16; coarser ones have twice as many.
        crowd: share of the patches' density that follows what is seen, up to 0.9; the rest is even, so that all of the
            image is seen still.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        fields: dict[str, int],
        in_chans: int = 3,
        side: int = 224,
        width: int = 32,
        crowd: float = MOST_CROWD,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value, divisor in (('side', side, COARSEST), ('width', width, 16)):
            if check_count(name, value, MOST_SIDE) % divisor:
                raise ValueError(f'expected {name} to be a multiple of {divisor}, got {value}')
        self.crowd = check_number('crowd', crowd, 0, MOST_CROWD)
        self.in_chans, self.side = in_chans, side
        wide, factory = 2 * width, {'device': device, 'dtype': dtype}
        self.stem = nn.Sequential(
            conv_norm_act(in_chans, width // 2, 2, factory), conv_norm_act(width // 2, width, 2, factory)
        )
        # Strides 8, 16 and 32.
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_norm_act(width if not depth else wide, wide, 2, factory),
                *(conv_norm_act(wide, wide, 1, factory) for _ in range(depth)),
            )
            for depth in range(3)
        )
        self.smooth = conv_norm_act(wide, wide, 1, factory)
        self.score = ZeroLinear(wide, 1, **factory)
        self.from_anchor = Linear(4, wide, bias=False, **factory)
        self.fields = nn.ModuleDict({name: ZeroLinear(wide, n, **factory) for name, n in fields.items()})
        self.init_weights()

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Of what it reads of an image ``(H, W)``: whole coarsest cells, about square."""
        root, cells = math.sqrt(int(image_size[0]) / int(image_size[1])), self.side / COARSEST
        height, width = (COARSEST * max(1, round(each)) for each in (cells * root, cells / root))
        return height, width

    def level(self, image_size: tuple[int, int]) -> int:
        """The coarsest level of the pyramid of an image ``(H, W)`` that is no smaller than what is read."""
        ratio = min(int(own) / read for own, read in zip(image_size, self.size(image_size), strict=True))
        return max(0, math.floor(math.log2(ratio)))

    def look(self, pyramid: list[Tensor]) -> Look:
        """See `Localizer`; its memory is features ``(B, D, h, w)``."""
        image_size = (pyramid[0].shape[2], pyramid[0].shape[3])
        # At least float32, also in half precision: where patches lie must not be rounded.
        dtype = torch.promote_types(self.score.weight.dtype, torch.float32)
        image = pyramid[self.level(image_size)].float()
        features = self.stem(resize(image, list(self.size(image_size)), 'bilinear').to(dtype))
        strides = []
        for stage in self.stages:
            features = stage(features)
            strides.append(features)
        for finer in (strides[1], strides[0]):
            features = finer + resize(features, [finer.shape[2], finer.shape[3]], 'bilinear')
        features = self.smooth(features).float()
        saliency = self.score(features.movedim(1, -1)).squeeze(-1)
        density = torch.softmax(saliency.flatten(1), dim=1).reshape(saliency.shape)
        return Look(features, saliency=saliency, density=density if self.crowd else None)

    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        """See `Localizer`."""
        grid = anchors.centres.expand(look.memory.shape[0], -1, -1).unsqueeze(1)
        there = grid_sample(look.memory, grid).squeeze(2).transpose(1, 2)  # (B, N, D)
        hidden = F.gelu(there + self.from_anchor(torch.cat([anchors.centres, torch.log(anchors.extents)], dim=-1)))
        return {name: layer(hidden).float() for name, layer in self.fields.items()}

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Also adapt the first convolution to the channels."""
        super().fit(state_dict, prefix)
        stem = f'{prefix}stem.0.0.weight'
        if stem in state_dict:
            state_dict[stem] = convert_channels(state_dict[stem], self.in_chans, stem)


register_localizer('saliency', SaliencyLocalizer)
