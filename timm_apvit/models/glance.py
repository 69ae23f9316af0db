"""Where to look, by a glance of the ViT itself: ``localizer='glance'``.

The ViT's own first blocks read a coarse grid of the whole image, and every token of it gives evidence for each class.
All tokens together are the glance's answer, which is added to that of the ViT, so that any loss on the output teaches
it; and where the evidence comes from is where the patches go.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_apvit.patching.anchors import Layout, rows_of
from timm_apvit.patching.coords import about_square, check_count, check_number, in_float32
from timm_apvit.patching.layers import LayerNorm, Linear, ScaleKeeping, ZeroLinear
from timm_apvit.patching.localizers import FeatureLocalizer, Look, register_localizer
from timm_apvit.patching.windows import best_window

# Rows and columns of a glance: beyond it takes longer, and more memory, than anyone means it to.
MOST_GRID = 64


class Held:
    """A module at hand that is no part of what holds it; copied with it only if both are copied together."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Held':
        return Held(memo.get(id(self.module), self.module))


class GlanceLocalizer(ScaleKeeping, FeatureLocalizer):
    """Evidence for the classes in a coarse grid of tokens, after the ViT's first blocks, and a window about it.

    For class c there is evidence ``e(t, c)`` in token t, which counts by a score: in all of them it is
    ``log sum_t softmax(s)(t) exp(e(t, c))`` (multiple-instance learning; Pinheiro and Collobert 2015,
    https://arxiv.org/abs/1411.6228). So what is where is one softmax over places and classes, as in detection, and
    labels alone teach it: its sum over places is the glance's answer, that over classes the saliency of a place. The
    last layers are zero: no evidence, and the whole image.

    The ViT's first blocks are shared, and learn from both of their tasks.

    Args:
        fields: as for `Localizer`.
        in_chans: image channels C.
        blocks: how many of the ViT's blocks read the glance; default: half of them.
        grid: rows and columns of the glance at a square image, at most 64; others have about as many cells.
        width: of the hidden layers.
        max_focus: largest factor by which a window closes in; 1: it is the whole image.
        answer_drop: share of the images in train mode to which the glance's answer is not added, so that the ViT
            learns to answer by itself.
        classes: numbers of classes, 0 for pooled features, that it learnt to tell, the last ones last; the others still
            say where to look. Default: those of the ViT.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a number out of range, more blocks than the ViT has, or a ViT that drops patches in train mode.
    """

    under_autocast = True
    answers = True

    def __init__(
        self,
        fields: dict[str, int],
        in_chans: int = 3,
        blocks: int | None = None,
        grid: int = 12,
        width: int = 256,
        max_focus: float = 3.0,
        answer_drop: float = 0.5,
        classes: Sequence[int] = (),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.widths, self.factory = dict(fields), {'device': device, 'dtype': dtype}
        self.blocks = 0 if blocks is None else check_count('blocks', blocks)
        self.grid, self.width = check_count('grid', grid, MOST_GRID), check_count('width', width)
        self.max_focus = check_number('max_focus', max_focus, 1)
        self.answer_drop = check_number('answer_drop', answer_drop, 0, 1)
        if not (isinstance(classes, Sequence) and all(type(n) is int and n >= 0 for n in classes)):
            raise ValueError(f'expected classes to be numbers of classes >= 0, got {classes!r}')
        self.told = list(classes)
        self.held = Held(None)

    def attach(self, vit: Any) -> None:
        """Make the layers that read the tokens of a ViT."""
        self.held = Held(vit)
        self.blocks = self.blocks or max(1, len(vit.blocks) // 2)
        if self.blocks > len(vit.blocks):
            raise ValueError(f'expected blocks of the glance to be at most {len(vit.blocks)}, got {self.blocks}')
        if not isinstance(vit.patch_drop or nn.Identity(), nn.Identity):
            raise ValueError("expected patch_drop_rate=0 with localizer='glance', whose tokens have their places")
        width, factory = self.width, self.factory
        self.norm = LayerNorm(vit.embed_dim, **factory)
        self.evidence = nn.Sequential(Linear(vit.embed_dim, width, **factory), nn.GELU())
        self.score = ZeroLinear(width, 1, bias=False, **factory)
        self.place = nn.Sequential(Linear(vit.embed_dim, width, **factory), nn.GELU())
        self.from_anchor = Linear(4, width, bias=False, **factory)
        self.fields = nn.ModuleDict({name: ZeroLinear(width, n, **factory) for name, n in self.widths.items()})
        if self.told[-1:] != [vit.num_classes]:
            self.told.append(vit.num_classes)
        self.classes = nn.ModuleList(self._classifier(n) for n in self.told)
        self.init_weights()

    def reset_classifier(self, num_classes: int) -> None:
        """Give evidence for so many classes, or if there are none for the pooled features; at first there is none.

        It goes on looking where it looked for the classes before.
        """
        if not self.knows_classes:
            self.classes, self.told = self.classes[:-1], self.told[:-1]
        self.classes.append(self._classifier(num_classes))
        self.told.append(num_classes)

    def specification(self, given: Any) -> Any:
        """See `Localizer`."""
        options = {k: v for k, v in given.items() if k != 'classes'} if isinstance(given, Mapping) else {'name': given}
        if len(self.told) > 1 or self.knows_classes:
            return {**options, 'classes': list(self.told)}
        return options if isinstance(given, Mapping) else given

    def _classifier(self, num_classes: int) -> ZeroLinear:
        like = self.score.weight
        rows = num_classes or self.vit.num_features
        made = ZeroLinear(self.width, rows, device=like.device, dtype=like.dtype)
        return made.requires_grad_(like.requires_grad)

    def _classifiers(self) -> list[ZeroLinear]:
        return list(self.classes)  # type: ignore[arg-type]

    def init_non_persistent_buffers(self) -> None:
        """Make classifiers zero that a checkpoint lacks: transformers leaves them to chance, and calls this then."""
        if loaded_by_transformers(self.score):
            for layer in self._classifiers():
                if not loaded_by_transformers(layer):
                    layer.init_weights()

    @property
    def knows_classes(self) -> bool:
        """Whether it learnt to tell the classes of the ViT."""
        weight: Any = self.classes[-1].weight
        return not weight.is_meta and bool(weight.any())

    @property
    def vit(self) -> Any:
        """The ViT whose localiser this is.

        Raises:
            ValueError: it is none's.
        """
        if self.held.module is None:
            raise ValueError("expected localizer='glance' in a ViT of timm, whose blocks it reads, got none")
        return self.held.module

    def level(self, image_size: tuple[int, int]) -> int:
        """See `Localizer`."""
        levels: int = self.vit.patch_embed.patching.num_levels(image_size, self.layout(image_size))
        return levels - 1

    def layout(self, image_size: tuple[int, int]) -> Layout:
        """Cells about square of an image ``(H, W)``."""
        return Layout(rows_of(about_square(self.grid, image_size), (1, 1)))

    def look(self, pyramid: list[Tensor]) -> Look:
        """See `Localizer`; its memory is features of the places, ``(B, D, h, w)``."""
        tokens, grid = self.tokens(pyramid)
        with in_float32(tokens.device):
            tokens = self.norm(tokens.float())
            evidence = self.evidence_of(tokens)  # (B, h * w, classes)
            answer = answer_of(evidence)
            if self.training and self.answer_drop > 0:
                answer = answer * (torch.rand(answer.shape[0], 1, device=answer.device) >= self.answer_drop)
            saliency = saliency_of(evidence).reshape(-1, *grid)
            # What moves a patch is no lesson for the ViT, and what a window misses none for the saliency.
            places = self.place(tokens.detach()).reshape(-1, *grid, self.width)
            memory = places.movedim(-1, 1)
            return Look(memory, best_window(saliency, self.max_focus), saliency, answer)

    def tokens(self, pyramid: list[Tensor]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of a coarse grid over the whole image, after the first blocks, ``(B, h * w, D)``; and h, w."""
        layout = self.layout((pyramid[0].shape[2], pyramid[0].shape[3]))
        patches = self.vit.patch_embed.unmoved(pyramid, layout)
        [tokens] = self.vit.forward_intermediates(
            patches, [self.blocks - 1], stop_early=True, output_fmt='NLC', intermediates_only=True
        )
        return tokens, layout.grids[0].grid

    def evidence_of(self, tokens: Tensor) -> Tensor:
        """Evidence of normalised tokens ``(B, T, D)`` for each class, ``(B, T, classes)``."""
        hidden = self.evidence(tokens)
        *earlier, evidence = (classes(hidden) for classes in self.classes)
        score = self.score(hidden)
        for each in earlier:  # so that without new evidence it looks where it looked
            score = score + torch.logsumexp(each, dim=-1, keepdim=True)
        told: Tensor = evidence + torch.log_softmax(score, dim=1)
        return told

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Also take all classifiers of a checkpoint; after one of other classes comes a new one.

        Where their number differs, what is loaded has new parameters: make an optimiser afterwards.
        """
        super().fit(state_dict, prefix)
        bias = re.compile(rf'{re.escape(prefix)}classes\.(\d+)\.bias')
        found = {int(match[1]): len(value) for key, value in state_dict.items() if (match := bias.fullmatch(key))}
        before = self._classifiers()
        theirs, own = [found[n] for n in sorted(found)], [len(layer.weight) for layer in before]
        if not theirs or theirs == own:
            return
        known = theirs != own[:-1] and theirs[-1] == own[-1]
        layers = [before[n] if own[n : n + 1] == [rows] else self._classifier(rows) for n, rows in enumerate(theirs)]
        if not known:
            layers.append(before[-1] if before[-1] not in layers else self._classifier(self.told[-1]))
            values = layers[-1].state_dict(prefix=f'{prefix}classes.{len(theirs)}.')
            state_dict.update({key: value for key, value in values.items() if not value.is_meta})
        if theirs != own[:-1]:
            self.told = [*(theirs[:-1] if known else theirs), self.told[-1]]
            self.classes = nn.ModuleList(layers)


def loaded_by_transformers(layer: ZeroLinear) -> bool:
    """Whether transformers marked a layer as one that the checkpoint had."""
    return getattr(layer.weight, '_is_hf_initialized', False)


def glances(model: Any) -> bool:
    """Whether the localiser of an APViT is a glance."""
    return isinstance(model.patch_embed.patching.localizer, GlanceLocalizer)


def answer_of(evidence: Tensor) -> Tensor:
    """Evidence in all places ``(B, T, classes)`` together: ``(B, classes)``."""
    return torch.logsumexp(evidence, dim=1)


def saliency_of(evidence: Tensor) -> Tensor:
    """How much evidence ``(B, T, classes)`` each place has, whatever it is of: logits ``(B, T)``."""
    return torch.logsumexp(evidence, dim=2)


register_localizer('glance', GlanceLocalizer)
