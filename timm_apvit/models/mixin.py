"""APViT: what every Vision Transformer of timm needs so that its patch grid is learned and follows the content."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_apvit.models.checkpoint import ADAPTIVE_KEYS
from timm_apvit.models.dense import dense_map, splat_weights
from timm_apvit.models.patch_embed import AdaptivePatchEmbed, PatchTokens
from timm_apvit.patching.anchors import NumPatches
from timm_apvit.patching.coords import check_patch_size
from timm_apvit.patching.geometry import PatchGeometry
from timm_apvit.patching.pos_embed import layout_pos_embed
from timm_apvit.patching.transforms import BOUNDS, TRANSFORMS, other_bounds

if TYPE_CHECKING:
    from timm.models import VisionTransformer as TimmViT
else:
    TimmViT = nn.Module  # whichever of timm's classes comes next

# FX takes these as leaves: their control flow depends on shapes.
for _name in ('layout_pos_embed', 'splat_weights', 'dense_map', 'with_answer'):
    torch.fx.wrap(_name)
register_notrace_module(AdaptivePatchEmbed)

# Arguments of every APViT that a ViT of timm does not have.
ADAPTIVE_ARGS = frozenset(('num_patches', 'transform', 'localizer', 'jitter', 'window_jitter', 'whole_share', *BOUNDS))
# What other libraries, and timm's own maps of features, wrap a model in, by the attribute that has the model.
WRAPPED = ('_orig_mod', 'module', 'timm_model', 'merge_and_unload', 'model', 'vit')


class APViT(TimmViT):  # type: ignore[misc]
    """A Vision Transformer of timm on adaptive patches: what is common to all of them.

    A new APViT with the weights of a ViT gives that ViT's own output. The number of patches is free, changes no
    parameter's shape, and can be set on a built model; images of any size are accepted. Made by ``timm.create_model``
    under the names that `timm_apvit` registers, or of a built ViT by `timm_apvit.adapt`.

    Modifications of timm's classes, of which each comes after this one (`timm_apvit.models.vits`):
        ``patch_embed`` is an `AdaptivePatchEmbed`, which returns tokens *and* their geometry;
        ``_pos_embed`` reads the position embedding at the patches' centres;
        ``forward_intermediates`` puts tokens back where they looked (`timm_apvit.models.dense`), as a reshape of free
        tokens to a grid would lie;
        ``forward`` adds the answer of a localiser that has one, and ``reset_classifier`` resets it;
        ``group_matcher`` keeps the localiser out of the stem, so that layer decay gives it the full rate.

    Args:
        num_patches: N, ``(gh, gw)``, or a layout by name, such as ``{'name': 'coarse_fine', 'coarse': 4, 'fine': 7}``
            (`timm_apvit.patching.anchors`); default: the base grid of ``img_size``, also after ``set_input_size``, and
            the input's own grid with ``dynamic_img_size``.
        kwargs: further arguments of `timm_apvit.AdaptivePatching`: ``transform``, ``localizer``, ``jitter``,
            ``window_jitter``, ``whole_share``, and the bounds of the transform, ``max_shift``,
            ``max_zoom``, ...; and those of timm's class.

    Attributes:
        base_model: repository on the Hub that ``pretrained=True`` took the weights from, if it did.

    Raises:
        ValueError: an argument out of range.
        TypeError: an unknown argument.
    """

    base_model: str | None = None
    pretrained_cfg: dict[str, Any]
    patch_embed: Any

    def __init__(self, **kwargs: Any) -> None:
        adaptive, kwargs = split_adaptive(kwargs)
        if 'patch_size' in kwargs:
            check_patch_size(kwargs['patch_size'])
        super().__init__(**kwargs)
        self.make_adaptive(**adaptive)

    def make_adaptive(self, **adaptive: Any) -> None:
        """Exchange timm's patch embedding for an `AdaptivePatchEmbed` with such arguments."""
        self.patch_embed = AdaptivePatchEmbed(self.patch_embed, **adaptive).train(self.training)
        self.patch_embed.patching.localizer.attach(self)
        # timm's own functions, too, are to save what rebuilds the model.
        self._model_args = {**getattr(self, '_model_args', {}), **self.adaptive_args()}

    def adaptive_args(self) -> dict[str, Any]:
        """Adaptive arguments of ``create_model`` that rebuild this model as it is now; config.json can hold them."""
        return {'num_patches': self.patch_embed.requested, **self.patch_embed.patching.arguments()}

    @property
    def num_patches(self) -> int:
        """Number N of patches (with ``dynamic_img_size`` and none set: that of an image of the nominal size)."""
        return int(self.patch_embed.patching.layout.num_patches)

    def set_num_patches(self, num_patches: NumPatches | None) -> None:
        """Take N, ``(gh, gw)`` or a layout by name from now on, or None, the default; any other is a ValueError."""
        self.patch_embed.set_num_patches(num_patches)
        self._model_args = {**self._model_args, 'num_patches': self.patch_embed.requested}

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: also of what makes patches crowd, which trainings may not teach."""
        names: set[str] = set(super().no_weight_decay())
        if crowds(self):
            localizer = self.patch_embed.patching.localizer
            names.update(f'patch_embed.patching.localizer.{name}' for name, _ in localizer.named_parameters())
        return names

    def patch_geometry(self, x: Tensor) -> PatchGeometry:
        """Where the patches of a batch of images ``(B, C, H, W)`` lie; of a forward in eval mode, or without noise."""
        geometry: PatchGeometry = self.patch_embed(x).geometry
        size = (x.shape[-2], x.shape[-1])
        canvas = self.patch_embed.canvas_size(size)
        return geometry if canvas == size else geometry.in_frame(canvas, size)

    def patch_coverage(self, x: Tensor) -> Tensor:
        """Share of each cell of a dense map that patches see, ``(B, 1, h, w)``; a map has a value in all of them."""
        grid_size = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return splat_weights(self.patch_embed(x).geometry, grid_size).coverage.unsqueeze(1)

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Images ``(B, C, H, W)`` -> logits, or pooled features.

        A localiser that has an answer of its own adds it to them.
        """
        if not self.patch_embed.patching.localizer.answers:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        patches = self.patch_embed(x)
        output = super().forward(patches, attn_mask=attn_mask, is_causal=is_causal)
        answer = patches.geometry.logits
        if self.global_pool == '':
            answer = answer.unsqueeze(1)
        if isinstance(output, tuple):  # a distillation head's beside that of the labels
            return tuple(with_answer(each, answer) for each in output)
        return with_answer(output, answer)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """As in timm; the localiser's own classifier, if it has one, starts anew as well."""
        super().reset_classifier(num_classes, *args, **kwargs)
        self.patch_embed.patching.localizer.reset_classifier(num_classes)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As in timm; ValueError if the localiser reads blocks that would go."""
        result, blocks = super().prune_intermediate_layers(*args, **kwargs), len(self.blocks)
        needed = getattr(self.patch_embed.patching.localizer, 'blocks', 0)
        if needed > blocks:
            raise ValueError(f'expected features of block {needed - 1} or a later one, as the localizer reads {needed} '
                             f'blocks, got {blocks - 1} as the last of them')  # fmt: skip
        return result

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer decay. What a ViT does not have matches none of them, and so learns at the head's rate."""
        matcher: dict[str, Any] = super().group_matcher(coarse)
        adaptive = '|'.join(ADAPTIVE_KEYS).replace('.', r'\.')
        return {**matcher, 'stem': f'(?!{adaptive})(?:{matcher["stem"]})'}

    def _pos_embed(self, x: PatchTokens) -> Any:
        """Add the position embedding at the patches' centres and put the prefix tokens first: ``(B, T + N, D)``."""
        tokens = x.tokens
        prefix = [
            getattr(self, name).expand(tokens.shape[0], -1, -1)
            for name in ('cls_token', 'dist_token', 'reg_token')
            if getattr(self, name, None) is not None
        ]
        if self.pos_embed is None:
            return self.pos_drop(torch.cat([*prefix, tokens], dim=1))
        num_embedded = 0 if self.no_embed_class else self.num_prefix_tokens
        grid = tuple(self.patch_embed.grid_size)
        pos_embed = layout_pos_embed(self.pos_embed, x.positions, x.layout, grid, num_embedded)
        if num_embedded == 0:
            return self.pos_drop(torch.cat([*prefix, tokens + pos_embed], dim=1))
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) + pos_embed)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Forward that also returns the tokens after chosen blocks; arguments and results as in timm.

        With ``output_fmt='NCHW'`` each map ``(B, D, h, w)`` has the grid of the image, whatever N: a cell is the
        average of the tokens whose patches cover it, weighted by overlap. ``'NLC'`` gives the tokens ``(B, N, D)`` as
        they are; `patch_geometry` says where they lie.

        Raises:
            ValueError: an unknown ``output_fmt``; NCHW maps while tokens are dropped (``patch_drop_rate``, train mode).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"expected output_fmt to be 'NCHW' or 'NLC', got {output_fmt!r}")
        patches = self.patch_embed(x)
        # timm's own forward, of patches that were taken before: they stand for the images.
        result = super().forward_intermediates(
            patches, indices, return_prefix_tokens, norm, stop_early, 'NLC', intermediates_only, **kwargs
        )
        if output_fmt == 'NLC':
            return result
        grid_size = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        weights = splat_weights(patches.geometry, grid_size)

        def as_map(tokens: Any) -> Any:
            if isinstance(tokens, tuple):  # with their prefix tokens
                return as_map(tokens[0]), *tokens[1:]
            return dense_map(tokens, weights, grid_size)

        if isinstance(result, dict):
            return {**result, 'image_intermediates': [as_map(tokens) for tokens in result['image_intermediates']]}
        if intermediates_only:
            return [as_map(tokens) for tokens in result]
        return result[0], [as_map(tokens) for tokens in result[1]]


def with_answer(output: Tensor, answer: Tensor) -> Tensor:
    """Add a localiser's answer to the logits ``(..., classes)``; ValueError if they are of other classes."""
    if output.shape[-1] != answer.shape[-1]:
        raise ValueError(
            f'expected {answer.shape[-1]} outputs of the classifier, for which the glance has evidence, got '
            f'{output.shape[-1]}; change their number by reset_classifier'
        )
    return output + answer.to(output.dtype)


def split_adaptive(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adaptive arguments, and the others; bounds that only other families have are left out.

    As with the bounds of all families, a model may change its family and keep those of the one that it had.

    Raises:
        ValueError: a ``max_focus``, which earlier versions had, that is not 1.
        TypeError: a name that is nearly that of an adaptive argument.
    """
    if arguments.get('max_focus', 1) != 1:
        raise ValueError(
            "expected localizer='glance' in the place of max_focus: it finds its window in any training, got "
            f'max_focus={arguments["max_focus"]!r}'
        )
    transform = arguments.get('transform', 'scale')
    known = ADAPTIVE_ARGS | TRANSFORMS.named(transform).own_bounds.keys()
    left_out = known | other_bounds(transform) | {'max_focus'}
    adaptive = {name: value for name, value in arguments.items() if name in known}
    others = {name: value for name, value in arguments.items() if name not in left_out}
    for name in others:
        if near := get_close_matches(name, known, n=1, cutoff=0.8):
            raise TypeError(f'expected arguments of an APViT, got {name!r}: did you mean {near[0]}?')
    return adaptive, others


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let a model run in eval mode, then each of its modules in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def crowds(model: APViT) -> bool:
    """Whether the patches of a model crowd: an even grid of them, and not where labels alone teach it."""
    return bool(model.patch_embed.patching.localizer.crowd)


def check_apvit(model: Any) -> None:
    """Raise ValueError unless a model is an APViT, and say where it is if another library wrapped it."""
    if not isinstance(model, APViT):
        raise ValueError(f'expected an APViT, got {type(model).__name__}{where_is(model)}')


def where_is(model: Any) -> str:
    """Where the model is that another library wrapped, for errors; nothing if it did not."""
    inner = next((name for name in WRAPPED if hasattr(model, name)), None)
    return f'; give its model.{inner}' + '()' * (inner == 'merge_and_unload') if inner else ''
