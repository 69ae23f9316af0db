"""APViT: a Vision Transformer whose patch grid is learned and follows the content of the image."""

from functools import partial
from typing import Any, Optional, Union

import torch
from timm.layers import register_notrace_module
from timm.models import VisionTransformer, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor

from timm_apvit.coords import NumPatches
from timm_apvit.dense import dense_map, splat_weights
from timm_apvit.geometry import PatchGeometry
from timm_apvit.patch_embed import ADAPTIVE_MODULES, AdaptivePatchEmbed, PatchTokens
from timm_apvit.pos_embed import interpolate_pos_embed, resample_pos_embed
from timm_apvit.transforms import other_bounds, transform_family
from timm_apvit.weights import check_npz

# FX takes these as leaves: their control flow depends on shapes.
for _name in ('interpolate_pos_embed', 'resample_pos_embed', 'splat_weights', 'dense_map'):
    torch.fx.wrap(_name)
register_notrace_module(AdaptivePatchEmbed)

# Prefixes of the parameters that a ViT does not have.
ADAPTIVE_KEYS = tuple(f'patch_embed.{name}' for name in ADAPTIVE_MODULES)
# What other libraries, and timm's own maps of features, wrap a model in, by the attribute that has the model.
WRAPPED = ('_orig_mod', 'module', 'timm_model', 'merge_and_unload', 'model')


class APViT(VisionTransformer):  # type: ignore[misc]
    """Vision Transformer on adaptive patches.

    A new APViT with the weights of a ViT gives that ViT's own output. The number of patches is free, changes no
    parameter's shape, and can be set on a built model; images of any size are accepted.

    Modifications of timm's ``VisionTransformer``:
        ``patch_embed`` is an `AdaptivePatchEmbed`, which returns tokens *and* their geometry;
        ``_pos_embed`` reads the position embedding at the patches' centres;
        ``forward_intermediates`` is restated to put tokens back where they looked (`timm_apvit.dense`), as timm's
        reshape of free tokens to a grid would lie; ``group_matcher`` keeps the localisation network out of the stem,
        so that layer decay gives it the full rate; ``set_input_size`` and ``reset_classifier`` record what changed,
        for saving.

    Args:
        num_patches: N or ``(gh, gw)``; default: the base grid of ``img_size``, also after ``set_input_size``, and the
            input's own grid with ``dynamic_img_size``.
        transform: what a patch may do: ``'translation'``, ``'scale'``, ``'anisotropic_scale'``, ``'similarity'``,
            ``'affine'``, ``'projective'``, ``'tps'``, or a family of your own (`timm_apvit.register_transform`).
        jitter: noise on the centres in train mode, in units of the patches' own half-extents.
        max_shift: how far a patch may move along each axis, in cells of its anchor.
        max_zoom: largest factor by which a patch may grow or shrink along each axis.
        max_rotation: in degrees.
        max_shear: x displacement per unit of y.
        max_perspective: of ``'projective'``: share by which a patch may grow or shrink towards a side or corner.
        max_warp: of ``'tps'``: how far each of 4 x 4 control points may move, in half-extents of the patch.
        max_focus: largest factor by which the anchors as a whole close in on what matters in the image; 1: they tile
            the image; at most 5. What matters is learnt from labels and attention by the fine-tuning command, and by no
            other training.
        kwargs: those of timm's ``VisionTransformer``, and further bounds of a family of your own; those of another
            registered family have no effect.

    Attributes:
        base_model: repository on the Hub that ``pretrained=True`` took the weights from, if it did.

    Raises:
        ValueError: an argument out of range.
        TypeError: an unknown argument.
    """

    base_model: Optional[str] = None

    __jit_unused_properties__ = ['num_patches']  # noqa: RUF012  TorchScript compiles every other property

    def __init__(
        self,
        *,
        num_patches: Optional[NumPatches] = None,
        transform: str = 'scale',
        jitter: float = 0.0,
        max_shift: float = 1.0,
        max_zoom: float = 2.0,
        max_rotation: float = 45.0,
        max_shear: float = 0.5,
        max_perspective: float = 0.3,
        max_warp: float = 0.25,
        max_focus: float = 1.0,
        **kwargs: Any,
    ) -> None:
        own = {name: kwargs.pop(name) for name in transform_family(transform).own_bounds if name in kwargs}
        # As with the bounds of all families, a model may change its family and keep those of the one that it had.
        others = other_bounds(transform)
        kwargs = {name: value for name, value in kwargs.items() if name not in others}
        patching: dict[str, Any] = {
            'transform': transform,
            'jitter': jitter,
            'max_shift': max_shift,
            'max_zoom': max_zoom,
            'max_rotation': max_rotation,
            'max_shear': max_shear,
            'max_perspective': max_perspective,
            'max_warp': max_warp,
            'max_focus': max_focus,
            **own,
        }
        super().__init__(embed_layer=partial(AdaptivePatchEmbed, num_patches=num_patches, patching=patching), **kwargs)
        # What rebuilds this model; timm < 1.0.31 records nothing by itself.
        self._model_args = {k: v for k, v in kwargs.items() if k not in ('device', 'dtype')}
        self._record(**self.adaptive_args())

    @torch.jit.ignore
    def adaptive_args(self) -> dict[str, Any]:
        """Adaptive arguments of ``create_model`` that rebuild this model as it is now; config.json can hold them."""
        return {'num_patches': self.patch_embed.requested, **self.patch_embed.patching.bounds()}

    @property
    def num_patches(self) -> int:
        """Number N of patches (with ``dynamic_img_size`` and none set: that of an image of the nominal size)."""
        layout = self.patch_embed.layout
        return int(self.patch_embed.num_patches if layout is None else layout[0])

    @torch.jit.ignore
    def set_num_patches(self, num_patches: Optional[NumPatches]) -> None:
        """Take N or ``(gh, gw)`` patches from now on; None: the default. No parameter changes.

        Raises:
            ValueError: neither an integer >= 1 nor two of them.
        """
        self.patch_embed.set_num_patches(num_patches)
        self._record(num_patches=self.patch_embed.requested)

    @torch.jit.ignore
    def patch_geometry(self, x: Tensor) -> PatchGeometry:
        """Where the patches of a batch of images ``(B, C, H, W)`` lie; of a forward in eval mode, or without jitter."""
        geometry: PatchGeometry = self.patch_embed(x).geometry
        size = (x.shape[-2], x.shape[-1])
        canvas = self.patch_embed.canvas_size(size)
        if canvas != size:  # from the frame of what the patches tile to that of the image; angles are those of pixels
            ratio = x.new_tensor([canvas[1] / size[1], canvas[0] / size[0]], dtype=torch.float32)
            geometry = geometry._replace(
                centres=(geometry.centres + 1) * ratio - 1,
                extents=geometry.extents * ratio,
                image_from_patch=geometry.image_from_patch * ratio[:, None],
            )
        return geometry

    @torch.jit.ignore
    def set_input_size(
        self, img_size: Optional[tuple[int, int]] = None, patch_size: Optional[tuple[int, int]] = None
    ) -> None:
        """Change the nominal image size ``(h, w)`` and the patch size; see timm's ``VisionTransformer``."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._record(img_size=self.patch_embed.img_size, patch_size=self.patch_embed.patch_size)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier; see timm's ``VisionTransformer``."""
        super().reset_classifier(num_classes, global_pool)
        fc_norm = not isinstance(self.fc_norm, torch.nn.Identity)
        self._record(global_pool=self.global_pool, fc_norm=fc_norm)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load an original JAX checkpoint (.npz), which must be of this model's size.

        Raises:
            ValueError: it is of another size.
        """
        check_npz(checkpoint_path, self)
        super().load_pretrained(checkpoint_path, prefix)

    def _record(self, **changes: Any) -> None:
        """Note arguments that rebuild the model as it is now."""
        self._model_args = {**self._model_args, **changes}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Union[str, list[Any]]]:
        """Groups for layer decay. What a ViT does not have matches none of them, and so learns at the head's rate."""
        matcher: dict[str, Any] = super().group_matcher(coarse)
        adaptive = '|'.join(ADAPTIVE_KEYS).replace('.', r'\.')
        return {**matcher, 'stem': f'(?!{adaptive})(?:{matcher["stem"]})'}

    def _pos_embed(self, x: PatchTokens) -> Tensor:
        """Add the position embedding at the patches' centres and put the prefix tokens first: ``(B, T + N, D)``."""
        tokens = x.tokens
        batch = tokens.shape[0]
        prefix = []
        if self.cls_token is not None:
            prefix.append(self.cls_token.expand(batch, -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(batch, -1, -1))
        if self.pos_embed is None:
            return torch.cat(prefix + [tokens], dim=1)  # noqa: RUF005  TorchScript knows no unpacking

        num_embedded = 0 if self.no_embed_class else self.num_prefix_tokens
        anchor_grid = (x.anchor_grid[0], x.anchor_grid[1])
        base_grid = (self.patch_embed.grid_size[0], self.patch_embed.grid_size[1])
        # So each grid of patches has the embedding that timm's ViT of that grid has.
        pos_embed = resample_pos_embed(self.pos_embed, base_grid, anchor_grid, num_embedded)
        position = interpolate_pos_embed(pos_embed, x.geometry.centres, anchor_grid, num_embedded)
        if self.no_embed_class:
            embedded = torch.cat(prefix + [tokens + position], dim=1)  # noqa: RUF005
        else:
            embedded = torch.cat(prefix + [tokens], dim=1) + position  # noqa: RUF005
        dropped: Tensor = self.pos_drop(embedded)
        return dropped

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, list[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]], dict[str, Any]]:
        """Forward that also returns the tokens after chosen blocks; arguments and results as in timm.

        With ``output_fmt='NCHW'`` each map ``(B, D, h, w)`` has the grid of the image
        (``patch_embed.dynamic_feat_size``), whatever N: a cell is the average of the tokens whose patches cover it,
        weighted by overlap. ``'NLC'`` gives the tokens ``(B, N, D)`` as they are; `patch_geometry` says where they
        lie.

        Raises:
            ValueError: an unknown ``output_fmt``; NCHW maps while tokens are dropped (train mode, ``patch_drop_rate >
                0``).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"expected output_fmt to be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        grid_size = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

        patches = self.patch_embed(x)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(patches)))
        last = max_index if stop_early else len(self.blocks) - 1
        taken = []
        for i, block in enumerate(self.blocks[: last + 1]):
            tokens = self._run_block(block, tokens, attn_mask, is_causal)
            if i in take_indices:
                taken.append(self.norm(tokens) if norm else tokens)

        prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == 'NCHW' and maps:
            if maps[0].shape[1] != patches.tokens.shape[1]:
                raise ValueError('expected patch_drop_rate=0 or eval mode for NCHW maps, got dropped tokens')
            weights = splat_weights(patches.geometry, grid_size)
            maps = [dense_map(y, weights, grid_size) for y in maps]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {'image_intermediates': maps}
            if with_prefix:
                result['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                result['image_features'] = self.norm(tokens)
            return result
        if with_prefix:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (self.norm(tokens), maps)

    def _run_block(self, block: torch.nn.Module, x: Tensor, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
        """One block, as timm runs it: masked, checkpointed or plain."""
        if attn_mask is not None or is_causal:
            out: Tensor = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:
            out = checkpoint(block, x)
        else:
            out = block(x)
        return out


def check_apvit(model: Any) -> None:
    """Raise ValueError unless a model is an APViT, and say where it is if another library wrapped it."""
    if not isinstance(model, APViT):
        inner = next((name for name in WRAPPED if hasattr(model, name)), None)
        way = f'; give its model.{inner}' + '()' * (inner == 'merge_and_unload') if inner else ''
        raise ValueError(f'expected an APViT, got {type(model).__name__}{way}')
