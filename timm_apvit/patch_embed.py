"""timm's patch-embedding contract on adaptive patches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from timm_apvit.coords import NumPatches, anchors, check_num_patches, check_patch_size, layout_grid, resolve_layout
from timm_apvit.geometry import PatchGeometry
from timm_apvit.layers import ZeroLinear
from timm_apvit.patching import AdaptivePatching

GEOMETRY_FEATURES = 7
# Submodules of `AdaptivePatchEmbed` that timm's ``PatchEmbed`` does not have.
ADAPTIVE_MODULES = ('patching.', 'geometry_embed.')
# Of the layers that predict transforms. A first name of theirs ended in 'head', by which PEFT and others find a
# classifier; checkpoints of that time load.
_FIELDS, _FORMER_FIELDS = '.localizer.fields.', '.localizer.head.'


class PatchTokens(NamedTuple):
    """What `AdaptivePatchEmbed` returns.

    Attributes:
        tokens: ``(B, N, D)``.
        geometry: where their patches lie.
        anchor_grid: ``(gh, gw)`` of the anchors, to which the position embedding is to be resampled before it is read
            at the patches' centres: large cells would alias it, as they would alias the image.
    """

    tokens: Tensor
    geometry: PatchGeometry
    anchor_grid: tuple[int, int]


def geometry_features(geometry: PatchGeometry, anchor_centres: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """What a patch covers, beyond where its centre is: ``(B, N, 7)``; zero for a cell of ``grid_size`` in its place.

    Log half-extents against such a cell, way from the anchor in such cells, sine and cosine (less 1) of the rotation,
    shear. The same for all families, so that checkpoints fit: of a warp nothing is told.
    """
    moved = geometry.centres - anchor_centres
    rotation = geometry.rotation
    features = [
        torch.log(geometry.extents[..., 0] * grid_size[1]),
        torch.log(geometry.extents[..., 1] * grid_size[0]),
        moved[..., 0] * (grid_size[1] / 2),
        moved[..., 1] * (grid_size[0] / 2),
        torch.sin(rotation),
        torch.cos(rotation) - 1,
        geometry.shear,
    ]
    return torch.stack(features, dim=-1)


class AdaptivePatchEmbed(PatchEmbed):  # type: ignore[misc]
    """Adaptive patches -> tokens: ``(B, C, H, W)`` -> `PatchTokens`.

    Modifications of timm's ``PatchEmbed``:
        ``forward`` samples its patches through `AdaptivePatching` and returns their geometry with the tokens;
        ``grid_size`` and ``num_patches`` stay those of the base grid, which sizes the position embedding, while
        ``layout`` says how many patches are taken; any image size is accepted unless ``strict_img_size``.

    Args:
        img_size: size ``(h, w)`` that the base grid divides.
        patch_size: samples along a patch's side, or ``(P_h, P_w)``.
        in_chans: image channels.
        embed_dim: width D of the tokens.
        norm_layer: applied to the projected patches.
        flatten: accepted for timm's sake; tokens are always ``(B, N, D)``.
        output_fmt: accepted for timm's sake; ``'NHWC'`` (what timm asks for with ``dynamic_img_size``) lets the
            default number of patches follow the grid of the input.
        bias: of the projection.
        strict_img_size: accept images of ``img_size`` only.
        dynamic_img_pad: with a default number of patches that follows the input, pad it to a multiple of the patch
            size.
        num_patches: N or ``(gh, gw)``; default: the base grid.
        patching: further arguments of `AdaptivePatching`.
        device: of the parameters.
        dtype: of the parameters.
    """

    layout: Optional[tuple[int, int]]

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: Union[int, tuple[int, int]] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Optional[Callable[..., nn.Module]] = None,
        flatten: bool = True,
        output_fmt: Optional[str] = None,
        bias: bool = True,
        strict_img_size: bool = False,
        dynamic_img_pad: bool = False,
        num_patches: Optional[NumPatches] = None,
        patching: Optional[dict[str, Any]] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=check_patch_size(patch_size),
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            flatten=flatten,
            output_fmt=output_fmt,
            bias=bias,
            strict_img_size=strict_img_size,
            dynamic_img_pad=dynamic_img_pad,
            device=device,
            dtype=dtype,
        )
        if min(self.grid_size) < 1:
            raise ValueError(f'expected img_size to be at least the patch size {self.patch_size}, got {self.img_size}')
        self.follows_input = output_fmt == 'NHWC'
        self.patching = AdaptivePatching(
            patch_size=self.patch_size, in_chans=in_chans, device=device, dtype=dtype, **(patching or {})
        )
        self.geometry_embed = ZeroLinear(GEOMETRY_FEATURES, embed_dim, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(complete_state_dict)
        self.set_num_patches(num_patches)

    @torch.jit.ignore
    def set_num_patches(self, num_patches: Optional[NumPatches]) -> None:
        """Take N or ``(gh, gw)`` patches from now on; None: as many as the base grid has, whatever the input size."""
        self.requested = None if num_patches is None else check_num_patches(num_patches)
        self._update_layout()

    def _update_layout(self) -> None:
        base = self.grid_size[0] * self.grid_size[1], self.grid_size[0]
        wanted = base if self.requested is None else resolve_layout(self.requested, self.grid_size)
        self.patching.layout = wanted
        self.layout = None if self.requested is None and self.follows_input else wanted

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Optional[Union[int, tuple[int, int]]] = None,
        patch_size: Optional[Union[int, tuple[int, int]]] = None,
    ) -> None:
        """Change the base grid; a number of patches that was not set by hand follows it."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.patching.patch_size = self.patch_size
        self._update_layout()

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of dense features for an image ``(H, W)``, at least 1 x 1."""
        if self.dynamic_img_pad:
            return math.ceil(img_size[0] / self.patch_size[0]), math.ceil(img_size[1] / self.patch_size[1])
        return max(1, img_size[0] // self.patch_size[0]), max(1, img_size[1] // self.patch_size[1])

    def anchor_layout(self, img_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Base grid ``(gh, gw)`` and layout ``(N, rows)`` for an image ``(H, W)``."""
        layout = self.layout
        if layout is not None:
            return (self.grid_size[0], self.grid_size[1]), layout
        grid = self.dynamic_feat_size(img_size)  # the default number of patches follows the input
        return grid, (grid[0] * grid[1], grid[0])

    def canvas_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """What of an image ``(H, W)``, from its top-left corner, a default number of patches tiles.

        Not always the image: as in timm, ``dynamic_img_pad`` pads it, and an ``img_size`` that is no multiple of the
        patch size loses the rest of its rows and columns.
        """
        grid, _ = self.anchor_layout(img_size)
        pads = self.layout is None and self.dynamic_img_pad
        crops = self.layout is not None and self.requested is None and img_size == (self.img_size[0], self.img_size[1])
        if pads or crops:
            return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]
        return img_size

    def forward(self, x: Tensor) -> PatchTokens:
        """Embed the patches of a batch of images ``(B, C, H, W)``."""
        if self.strict_img_size and (x.shape[-2] != self.img_size[0] or x.shape[-1] != self.img_size[1]):
            raise ValueError(f'expected images of size {self.img_size}, got {list(x.shape)}')
        base_grid, layout = self.anchor_layout((x.shape[-2], x.shape[-1]))
        canvas = self.canvas_size((x.shape[-2], x.shape[-1]))
        if canvas[0] != x.shape[-2] or canvas[1] != x.shape[-1]:
            x = F.pad(x, [0, canvas[1] - x.shape[-1], 0, canvas[0] - x.shape[-2]])

        patches, geometry = self.patching(x, layout)
        dtype = self.proj.weight.dtype
        tokens = self.norm(self._project(patches.to(dtype)))
        centres, _ = anchors(layout, x.device)
        features = geometry_features(geometry, centres, base_grid)
        tokens = tokens + self.geometry_embed(features.to(dtype))
        return PatchTokens(tokens, geometry, layout_grid(layout))

    def _project(self, patches: Tensor) -> Tensor:
        """Project patches: ``(B, N, C, P_h, P_w)`` -> ``(B, N, D)``."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript would compile what an `and` joins
            if type(self.proj) is not nn.Conv2d:
                # An adapter, such as PEFT's: what it adds is in its forward alone.
                adapted: Tensor = self.proj(patches.flatten(0, 1))  # (B * N, D, 1, 1)
                return adapted.reshape(patches.shape[0], patches.shape[1], -1)
        # The convolution of a patch that is as large as its kernel is a matrix product, and three times as fast as one.
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


def complete_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a checkpoint that lacks what a ViT, or an APViT with a smaller transform family, does not have.

    A checkpoint without any parameter of ours gets the module's own, so that a plain ViT's loads strictly. One with
    them gets a zero, the identity, for each transform field that it does not predict; whatever else it lacks, loading
    reports.
    """
    for key in [key for key in state_dict if _FORMER_FIELDS in key]:
        state_dict[key.replace(_FORMER_FIELDS, _FIELDS)] = state_dict.pop(key)
    own = {k: v for k, v in module.state_dict(prefix=prefix).items() if k[len(prefix) :].startswith(ADAPTIVE_MODULES)}
    plain = not any(key in state_dict for key in own)
    focuses = any('.focus.' in key for key in state_dict)
    predicted = {key.rpartition('.')[0] for key in state_dict if _FIELDS in key}
    for key, value in own.items():
        field = key.rpartition('.')[0]
        new = plain or ('.focus.' in key and not focuses)
        if new and not value.is_meta:  # what holds no value is reported as missing
            state_dict[key] = value
        # Every family predicts the shift: a checkpoint without it is not of a smaller family, but broken.
        elif _FIELDS in key and field not in predicted and not field.endswith('.shift'):
            state_dict[key] = torch.zeros_like(value)
