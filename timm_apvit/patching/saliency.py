"""Where it matters, by a small network that masks or boxes teach: ``localizer='saliency'``."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_apvit.patching.coords import about_square, check_multiple, check_number
from timm_apvit.patching.deterministic import resize
from timm_apvit.patching.layers import Linear, ScaleKeeping, ZeroLinear, conv_norm_act, convert_channels
from timm_apvit.patching.localizers import MOST_CROWD, FeatureLocalizer, Look, coarsest_level, register_localizer

# Pixels along the side of the coarsest cells.
COARSEST = 32
# With less hardly any place is four times as dense as another, and no leaf is divided.
LEAST_CROWD = 0.1


class SaliencyLocalizer(ScaleKeeping, FeatureLocalizer):
    """How much each place matters, by a feature pyramid network; the patches crowd there.

    Convolutions read the image at strides of 2 to 32, the coarse ones are added to the finer (Lin et al. 2017,
    https://arxiv.org/abs/1612.03144), and there is a logit for every 8 x 8 pixels. At 224 pixels and a width of 32 it
    takes 83 million multiply-adds, 2 % of a ViT-S/16 with 196 patches. It finds no window.

    Nothing but `timm_apvit.learning.saliency.saliency_loss` teaches what matters. The last layers are zero: all places
    matter alike, and patches are the grid.

    Args:
        fields: as for `Localizer`.
        in_chans: image channels C.
        side: pixels along the side of the resized image, a multiple of 32; of one that is not square the side of a
            square with about as many.
        width: of the features at a stride of 4, a multiple of 16; coarser ones have twice as many.
        crowd: share of the patches' density that follows what is seen, from 0.1 to 0.9; the rest is even, so that all
            of the image is seen still.
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
        self.in_chans, self.side = in_chans, check_multiple('side', side, COARSEST)
        self.crowd = check_number('crowd', crowd, LEAST_CROWD, MOST_CROWD)
        check_multiple('width', width, 16)
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
        self.score = ZeroLinear(wide, 1, bias=False, **factory)
        self.from_anchor = Linear(4, wide, bias=False, **factory)
        self.fields = nn.ModuleDict({name: ZeroLinear(wide, n, **factory) for name, n in fields.items()})
        self.init_weights()

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what it reads of an image ``(H, W)``: whole coarsest cells, about square."""
        rows, columns = about_square(self.side / COARSEST, image_size)
        return rows * COARSEST, columns * COARSEST

    def level(self, image_size: tuple[int, int]) -> int:
        """See `Localizer`."""
        return coarsest_level(image_size, self.size(image_size))

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
        # What moves a patch is no lesson in what matters.
        return Look(features.detach(), saliency=saliency, density=density)

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Also adapt the first convolution to the channels."""
        super().fit(state_dict, prefix)
        stem = f'{prefix}stem.0.0.weight'
        if stem in state_dict:
            state_dict[stem] = convert_channels(state_dict[stem], self.in_chans, stem)


register_localizer('saliency', SaliencyLocalizer)
