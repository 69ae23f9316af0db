"""timm's patch-embedding contract on adaptive patches."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple
from torch import Tensor, nn

from timm_apvit.models.checkpoint import complete_state_dict
from timm_apvit.patching.anchors import Anchors, Layout, NumPatches, check_num_patches, even_grid, resolve_layout
from timm_apvit.patching.coords import check_patch_size
from timm_apvit.patching.geometry import PatchGeometry
from timm_apvit.patching.layer import AdaptivePatching
from timm_apvit.patching.layers import ZeroLinear

# What a patch covers, and the window.
GEOMETRY_FEATURES = 7 + 3
# What an adaptive embedding has of the one that it was made of.
SIZES = ('img_size', 'patch_size', 'grid_size', 'num_patches')
TAKEN_OVER = (*SIZES, 'flatten', 'output_fmt', 'dynamic_img_pad', 'proj', 'norm')


class PatchTokens(NamedTuple):
    """What `AdaptivePatchEmbed` returns; it stands for the images that it was made of where timm asks their shape.

    Attributes:
        tokens: ``(B, N, D)``.
        geometry: where their patches lie.
        positions: centres (x, y) as the ViT is to be told them, ``(B, N, 2)``: as if the window, if there is one, were
            the image, for a pretrained ViT knows crops as whole images.
        layout: of the anchors; the position embedding is to be resampled to its grids before it is read: large cells
            would alias it, as they would alias the image.
        base_grid: ``(gh, gw)`` of cells in which positions are told to a rotary embedding.
        shape: of the images, ``(B, C, H, W)``.
    """

    tokens: Tensor
    geometry: PatchGeometry
    positions: Tensor
    layout: Layout
    base_grid: tuple[int, int]
    shape: tuple[int, ...]


def geometry_features(geometry: PatchGeometry, anchors: Anchors, grid_size: tuple[int, int]) -> Tensor:
    """What a patch covers, beyond where its centre is: ``(B, N, 10)``; zero for a cell of ``grid_size`` in its place.

    As if the window were the image: log half-extents against such a cell, way from the anchor in such cells, sine and
    cosine (less 1) of the rotation, shear. Then of the window: centre (x, y) and log half-extent, zero if it is the
    image. The same for all families, so that checkpoints fit: of a warp nothing is told.
    """
    extents, moved, rotation = geometry.in_layout(anchors)[1], geometry.moves(anchors), geometry.rotation
    features = [
        torch.log(extents[..., 0] * grid_size[1]),
        torch.log(extents[..., 1] * grid_size[0]),
        moved[..., 0] * (grid_size[1] / 2),
        moved[..., 1] * (grid_size[0] / 2),
        torch.sin(rotation),
        torch.cos(rotation) - 1,
        geometry.shear,
    ]
    own = torch.stack(features, dim=-1)
    if geometry.window is None:
        return F.pad(own, [0, 3])
    window = torch.cat([geometry.window[:, :2], torch.log(geometry.window[:, 2:])], dim=-1)
    return torch.cat([own, window.unsqueeze(1).expand(-1, own.shape[1], -1)], dim=-1)


class AdaptivePatchEmbed(PatchEmbed):  # type: ignore[misc]
    """Adaptive patches -> tokens: ``(B, C, H, W)`` -> `PatchTokens`.

    Modifications of timm's ``PatchEmbed``:
        it is made of one, whose projection and norm it takes over;
        ``forward`` samples its patches through `AdaptivePatching` and returns their geometry with the tokens, and takes
        tokens as they are, so that timm's own forward can go on with patches that were looked at before;
        ``grid_size`` and ``num_patches`` stay those of the base grid, which sizes the position embedding, while
        ``layout`` says how many patches are taken; any image size is accepted.

    Args:
        embed: of a ViT of timm, on one convolution.
        num_patches: as `AdaptivePatching` takes it; None: the base grid, or with ``dynamic_img_size`` the grid of the
            input.
        patching: further arguments of `AdaptivePatching`.
    """

    layout: Layout | None

    def __init__(self, embed: PatchEmbed, num_patches: NumPatches | None = None, **patching: Any) -> None:
        nn.Module.__init__(self)
        for name in TAKEN_OVER:
            setattr(self, name, getattr(embed, name))
        self.patch_size = check_patch_size(embed.patch_size)
        self.strict_img_size = False
        if min(self.grid_size) < 1:
            raise ValueError(f'expected img_size to be at least the patch size {self.patch_size}, got {self.img_size}')
        self.follows_input = not self.flatten  # what timm asks for with dynamic_img_size
        weight = self.proj.weight
        factory = {'device': weight.device, 'dtype': weight.dtype}
        self.patching = AdaptivePatching(self.patch_size, in_chans=self.proj.in_channels, **factory, **patching)
        self.geometry_embed = ZeroLinear(GEOMETRY_FEATURES, weight.shape[0], **factory)
        self.register_load_state_dict_pre_hook(complete_state_dict)
        self.set_num_patches(num_patches)

    def set_num_patches(self, num_patches: NumPatches | None) -> None:
        """Take so many patches from now on; None: the base grid, or the input's with ``dynamic_img_size``."""
        requested = None if num_patches is None else check_num_patches(num_patches)
        if requested is not None and self.patching.localizer.crowd:
            even_grid(resolve_layout(requested, tuple(self.grid_size)))
        self._update_layout(requested)
        self.requested = requested

    @property
    def own_budget(self) -> NumPatches:
        """What `set_num_patches` takes for as many as there are."""
        layout = self.patching.layout
        if self.requested is not None:
            return self.requested
        return layout.grids[0].grid if self.patching.localizer.crowd else layout.num_patches

    def _default_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid ``(gh, gw)`` of an image as a number of patches; where they crowd the nearest even one."""
        if not self.patching.localizer.crowd:
            return grid
        return 2 * max(1, round(grid[0] / 2)), 2 * max(1, round(grid[1] / 2))

    def _update_layout(self, requested: Any) -> None:
        grid = (self.grid_size[0], self.grid_size[1])
        wanted = resolve_layout(self._default_grid(grid) if requested is None else requested, grid)
        self.patching.layout = wanted
        self.layout = None if requested is None and self.follows_input else wanted

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the base grid; a number of patches that was not set by hand follows it."""
        if self.patching.localizer.crowd and self.requested is not None:
            lengths, sides = to_2tuple(img_size or self.img_size), to_2tuple(patch_size or self.patch_size)
            grid = tuple(max(1, length // side) for length, side in zip(lengths, sides, strict=True))
            even_grid(resolve_layout(self.requested, grid))  # else all stays as it is
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.patching.patch_size = self.patch_size
        self._update_layout(self.requested)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of dense features for an image ``(H, W)``, at least 1 x 1."""
        gh, gw = super().dynamic_feat_size(img_size)
        return max(1, gh), max(1, gw)

    def anchor_layout(self, img_size: tuple[int, int]) -> tuple[tuple[int, int], Layout]:
        """Base grid ``(gh, gw)`` and layout for an image ``(H, W)``."""
        if self.layout is not None:
            return (self.grid_size[0], self.grid_size[1]), self.layout
        grid = self.dynamic_feat_size(img_size)  # the default number of patches follows the input
        return grid, resolve_layout(self._default_grid(grid), grid)

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

    def on_canvas(self, x: Tensor) -> Tensor:
        """Pad or crop images ``(B, C, H, W)`` to what the patches tile."""
        height, width = self.canvas_size((x.shape[-2], x.shape[-1]))
        if height == x.shape[-2] and width == x.shape[-1]:
            return x
        return F.pad(x, [0, width - x.shape[-1], 0, height - x.shape[-2]])

    def forward(self, x: Tensor | PatchTokens) -> PatchTokens:
        """Embed the patches of a batch of images ``(B, C, H, W)``."""
        if isinstance(x, PatchTokens):
            return x
        if isinstance(x, np.ndarray) or not hasattr(x, 'shape'):
            raise TypeError(f'expected images as a tensor (B, C, H, W), got {type(x).__name__}')
        shape = x.shape
        base_grid, layout = self.anchor_layout((shape[-2], shape[-1]))
        patches, geometry = self.patching(self.on_canvas(x), layout)
        return self._embed(patches, geometry, layout, base_grid, shape)

    def unmoved(self, pyramid: list[Tensor], layout: Layout) -> PatchTokens:
        """Embed the patches of a layout where its anchors are, from the mip levels of a batch of images."""
        patches, geometry = self.patching.unmoved(pyramid, layout)
        return self._embed(patches, geometry, layout, (self.grid_size[0], self.grid_size[1]), pyramid[0].shape)

    def _embed(
        self, patches: Tensor, geometry: PatchGeometry, layout: Layout, base_grid: tuple[int, int], shape: Any
    ) -> PatchTokens:
        dtype = self.proj.weight.dtype
        tokens = self.norm(self._project(patches.to(dtype)))
        anchors = layout.anchors(patches.device)
        features = geometry_features(geometry, anchors, base_grid)
        tokens = tokens + self.geometry_embed(features.to(dtype))
        return PatchTokens(tokens, geometry, geometry.in_layout(anchors)[0], layout, base_grid, shape)

    def _project(self, patches: Tensor) -> Tensor:
        """Project patches: ``(B, N, C, P_h, P_w)`` -> ``(B, N, D)``."""
        if type(self.proj) is not nn.Conv2d or self.proj._forward_pre_hooks or self.proj._forward_hooks:
            # An adapter, such as PEFT's, or a norm of its weights: what it adds is in its call alone.
            adapted: Tensor = self.proj(patches.flatten(0, 1))  # (B * N, D, 1, 1)
            return adapted.reshape(patches.shape[0], patches.shape[1], -1)
        # The convolution of a patch that is as large as its kernel is a matrix product, and three times as fast as one.
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)
