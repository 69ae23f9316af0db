"""A feature pyramid of a ViT, for decoders and detectors that want several scales.

``timm.create_model('pyramid.apvit_small_patch14_dinov2', features_only=True)`` is what every library takes that builds
its encoder by a name of timm; `pyramid` makes one of a built model.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo, _registry, register_model
from torch import Tensor, nn

from timm_apvit.models.apvit import twin_name
from timm_apvit.models.dense import check_all_there, dense_map, quarters, splat_weights
from timm_apvit.models.mixin import APViT, check_apvit, where_is
from timm_apvit.models.vits import ADAPTIVE_CLASSES
from timm_apvit.patching.coords import check_count, vector_on
from timm_apvit.patching.deterministic import grid_sample
from timm_apvit.patching.geometry import PatchGeometry

MAP_STRIDE = 16
STRIDES = (2, 4, 8, 16, 32, 64)
# Arguments of a pyramid that a ViT does not have.
OWN_ARGS = ('strides', 'out_channels', 'out_indices', 'block', 'feature_cls')


class FeaturePyramid(nn.Module):
    """Maps of several strides from the last tokens of a ViT, after ViTDet's simple feature pyramid (Li et al. 2022, 3).

    Strides are in pixels of the image, whatever the size of the patches and however many there are. Tokens become a map
    of stride 16, by `timm_apvit.models.dense`, those of a plain ViT by interpolation; coarser strides are its maxima.
    For finer ones a linear layer makes four tokens of each, for the quarters of its patch, and these become a map of
    stride 8: ViTDet's transposed convolution, but where the patches are, so that a small one tells its detail. A glance
    has no classes here: teach it where to look by `timm_apvit.learning.saliency.saliency_loss`, or its layers get no
    gradient.

    Args:
        vit: an APViT or another ViT of timm; it becomes a part of this, and loses its head.
        strides: of the maps, of 2, 4, 8, 16, 32 and 64, in rising order.
        out_channels: of each map.
        out_indices: which of the strides to give; None: all.
        block: whose tokens are taken; -1: the last.
        feature_cls: ``'list'``, or ``'dict'`` for an ordered dict with keys ``'0'``, ``'1'``, ..., as torchvision's
            detectors take it.

    Attributes:
        feature_info: channels and strides, as timm's backbones have them.

    Raises:
        ValueError: not such a model, or an argument out of range.
    """

    def __init__(
        self,
        vit: nn.Module,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_channels: int = 256,
        out_indices: Sequence[int] | None = None,
        block: int = -1,
        feature_cls: str = 'list',
    ) -> None:
        super().__init__()
        if not isinstance(vit, (APViT, *ADAPTIVE_CLASSES)):
            raise ValueError(f'expected an APViT or a ViT of timm, got {type(vit).__name__}{where_is(vit)}')
        strides = tuple(strides)
        if not strides or not set(strides) <= set(STRIDES) or list(strides) != sorted(set(strides)):
            raise ValueError(f'expected strides of {STRIDES}, each once and in rising order, got {strides}')
        if feature_cls not in ('list', 'dict'):
            raise ValueError(f"expected feature_cls to be 'list' or 'dict', got {feature_cls!r}")
        depth = len(vit.blocks)  # type: ignore[arg-type]
        if not -depth <= block < depth:
            raise ValueError(f'expected a block of -{depth} to {depth - 1}, got {block}')
        indices = tuple(range(len(strides)) if out_indices is None else out_indices)
        if not indices or not all(-len(strides) <= index < len(strides) for index in indices):
            raise ValueError(f'expected out_indices of the {len(strides)} strides {strides}, got {indices}')
        check_count('out_channels', out_channels)
        chosen = sorted({index % len(strides) for index in indices})
        self.vit, self.block, self.strides = vit, block % depth, tuple(strides[index] for index in chosen)
        self.out_channels, self.feature_cls = out_channels, feature_cls
        vit.prune_intermediate_layers([self.block], prune_norm=False, prune_head=True)  # type: ignore[operator]
        width: int = vit.embed_dim  # type: ignore[assignment]
        self.scales = nn.ModuleList(Scale(width, out_channels, stride) for stride in self.strides)
        self.pretrained_cfg = self.default_cfg = vit.pretrained_cfg
        self.feature_info = FeatureInfo(
            [{'num_chs': out_channels, 'reduction': stride, 'module': f'stride{stride}'} for stride in strides],
            tuple(chosen),
        )

    def forward(self, x: Tensor) -> list[Tensor] | OrderedDict[str, Tensor]:
        """Images ``(B, C, H, W)`` -> a map ``(B, out_channels, ceil(H / 16) * 16 / s, ...)`` of each stride s.

        Raises:
            ValueError: an image smaller than the coarsest stride, or dropped tokens (``patch_drop_rate``, train mode).
        """
        size = (x.shape[-2], x.shape[-1])
        if min(size) < self.strides[-1]:
            raise ValueError(f'expected images of at least {self.strides[-1]} pixels, the coarsest stride, got {size}')
        grid = (-(-size[0] // MAP_STRIDE), -(-size[1] // MAP_STRIDE))
        tokens, places = self.tokens_of(x, grid)
        base = places.onto(grid)(tokens) if self.strides[-1] >= MAP_STRIDE else None
        put = places.onto((2 * grid[0], 2 * grid[1]), True) if self.strides[0] < MAP_STRIDE else None
        maps = [scale(tokens, base, put) for scale in self.scales]
        if self.feature_cls == 'list':
            return maps
        return OrderedDict((str(number), each) for number, each in enumerate(maps))

    def tokens_of(self, x: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, 'Splatted | Tiled']:
        """The ViT's tokens ``(B, N, D)``, and where they belong in a grid of cells of 16 pixels."""
        arguments: dict[str, Any] = {'indices': [self.block], 'norm': True, 'intermediates_only': True}
        vit: Any = self.vit
        size = (grid_size[0] * MAP_STRIDE, grid_size[1] * MAP_STRIDE)
        if isinstance(vit, APViT):
            patches = vit.patch_embed(x)
            tokens: Tensor = vit.forward_intermediates(patches, output_fmt='NLC', **arguments)[0]
            check_all_there(tokens.shape[1], patches.geometry.centres.shape[1])
            own = vit.patch_embed.canvas_size((x.shape[-2], x.shape[-1]))
            return tokens, Splatted(patches.geometry.in_frame(own, size))
        features = vit.forward_intermediates(x, **arguments)[0]
        tiles = (features.shape[-2], features.shape[-1])
        patch = vit.patch_embed.patch_size
        return features.flatten(2).transpose(1, 2), Tiled(
            tiles, (size[0] / (tiles[0] * patch[0]), size[1] / (tiles[1] * patch[1]))
        )

    def set_num_patches(self, num_patches: Any) -> None:
        """As of an `APViT`; ValueError if the ViT is none."""
        check_apvit(self.vit)
        self.vit.set_num_patches(num_patches)  # type: ignore[operator]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of timm's backbones."""
        self.vit.set_grad_checkpointing(enable)  # type: ignore[operator]


class Splatted(NamedTuple):
    """Patches anywhere, whose tokens are put where they looked."""

    geometry: PatchGeometry

    def onto(self, grid_size: tuple[int, int], split: bool = False) -> Callable[[Tensor], Tensor]:
        """From tokens ``(B, N, D)``, or those of the patches' quarters ``(B, 4 * N, D)``, to a map ``(B, D, h, w)``."""
        weights = splat_weights(quarters(self.geometry) if split else self.geometry, grid_size)
        return lambda tokens: dense_map(tokens, weights, grid_size)


class Tiled(NamedTuple):
    """Patches that tile the image, whose map is interpolated.

    Attributes:
        tiles: rows and columns.
        share: height and width of a map, in those of what the patches tile.
    """

    tiles: tuple[int, int]
    share: tuple[float, float]

    def onto(self, grid_size: tuple[int, int], split: bool = False) -> Callable[[Tensor], Tensor]:
        """As of `Splatted`."""
        (rows, columns), (down, across), parts = self.tiles, self.share, 1 + split

        def put(tokens: Tensor) -> Tensor:
            image = tokens.reshape(tokens.shape[0], rows, columns, parts, parts, tokens.shape[2])
            image = image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
            theta = vector_on((across, 0.0, across - 1, 0.0, down, down - 1), image.device).to(image.dtype)
            theta = theta.reshape(1, 2, 3).expand(image.shape[0], 2, 3)
            places = F.affine_grid(theta, [image.shape[0], 1, *grid_size], align_corners=False)
            return grid_sample(image, places)

        return put


class Scale(nn.Module):
    """From tokens of a width to the map of a stride.

    Args:
        width: of the tokens.
        out_channels: of the map.
        stride: of the map, in pixels.

    Attributes:
        split: a token to those of the quarters of its patch; None: a stride of 16 or more.
        layers: from their map on.
    """

    def __init__(self, width: int, out_channels: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.split = None
        if stride < MAP_STRIDE:
            self.split = nn.Linear(width, 4 * (width // 2))
            width //= 2
            for _ in range((MAP_STRIDE // stride).bit_length() - 2):
                layers += [LayerNorm2d(width), nn.GELU(), nn.ConvTranspose2d(width, width // 2, 2, 2)]
                width //= 2
        elif stride > MAP_STRIDE:
            layers.append(nn.MaxPool2d(stride // MAP_STRIDE, ceil_mode=True))
        layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, base: Tensor | None, put: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Tokens ``(B, N, D)``, their map of stride 16, and what puts those of quarters on one of stride 8."""
        if self.split is not None and put is not None:
            batch, num, _ = tokens.shape
            base = put(self.split(tokens).reshape(batch, 4 * num, self.split.out_features // 4))
        made: Tensor = self.layers(base)
        return made


@register_model  # type: ignore[untyped-decorator]
def pyramid(
    vit: nn.Module | str | None = None,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    features_only: bool = True,
    output_stride: int | None = None,
    **kwargs: Any,
) -> FeaturePyramid:
    """Make a `FeaturePyramid` of a built model, or of one by its name.

    timm knows it as ``'pyramid.NAME'``, with the name of an APViT or of another ViT, and with its tag if it has one.

    Args:
        vit: the model, which becomes a part of the pyramid and loses its head, or its name.
        pretrained: load the ViT's weights, for a name.
        pretrained_cfg: the name, where timm calls this.
        features_only: always true; libraries ask for it.
        output_stride: 32 or None; libraries ask for it.
        kwargs: of `FeaturePyramid`; and for a name of ``timm.create_model``: ``num_patches``, ``img_size``, ...

    Raises:
        ValueError: no model, or an argument out of range.
        TypeError: arguments of ``timm.create_model`` for a built model.
    """
    if output_stride not in (None, 32) or not features_only:
        raise ValueError(
            'expected features_only=True and output_stride=32 or None of a pyramid, whose strides are an argument, got '
            f'features_only={features_only} and output_stride={output_stride}'
        )
    own = {name: kwargs.pop(name) for name in OWN_ARGS if name in kwargs}
    if isinstance(vit, nn.Module):
        if others := [
            name for name, value in {**kwargs, 'pretrained': pretrained or None}.items() if value is not None
        ]:
            raise TypeError(f'expected a name for arguments of create_model, got {", ".join(others)}')
        return FeaturePyramid(vit, **own)
    name = vit or pretrained_cfg
    if not isinstance(name, str):
        raise ValueError(
            "expected the ViT of a pyramid, such as 'pyramid.apvit_small' by a name of timm, or a built one, got "
            f'{name!r}'
        )
    if ':' not in name and not _adaptive(name):  # the fixed grid follows the image
        kwargs = {'dynamic_img_size': True, 'dynamic_img_pad': True, **kwargs}
    return FeaturePyramid(timm.create_model(name, pretrained=pretrained, **{**kwargs, 'num_classes': 0}), **own)


# As timm keeps an old name that still works out of ``list_models``: this one is of no use without the name of a ViT.
getattr(_registry, '_deprecated_models', {})['pyramid'] = None


def _adaptive(name: str) -> bool:
    """Whether a name is that of an APViT rather than of a ViT that has a twin; ValueError if it is neither."""
    if 'apvit' in name.partition('.')[0]:
        return True
    twin_name(name)
    return False
