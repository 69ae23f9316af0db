"""Localisers: what looks at the image and says where its patches lie.

A localiser is a part that one chooses: `LOCALIZERS` has those that come with this package, `register_localizer` adds
one of your own. It looks at the image once, finds a window for all anchors if it likes, and predicts the raw parameters
of a transform at each of them.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_apvit.patching.anchors import Anchors
from timm_apvit.patching.deterministic import grid_sample
from timm_apvit.patching.parts import Parts
from timm_apvit.patching.transforms import TRANSFORMS

# Below 1 all of the image has some of the density, and what holds a part of it more than that part.
MOST_CROWD = 0.9


class Look(NamedTuple):
    """What a localiser saw of a batch of images.

    Attributes:
        memory: what it reads when it predicts, its own business.
        window: centre (x, y) and half-extent of what the anchors are to be laid over, ``(B, 3)``, inside the image;
            None: all of it. It keeps the image's aspect.
        saliency: logits of where it looks, ``(B, h, w)`` over the image, which masks can teach; None: it does not say.
        logits: its own answer, ``(B, classes)``, which is added to that of the ViT; None: it has none.
        density: how many patches each place of the image is to have, relative to others, ``(B, h, w)``, at least 0: the
            anchors crowd there, and tile the image still (`timm_apvit.patching.anchors.divided`); None: they stay
            where the layout has them. Its gradient is zero: teach it by its saliency.
    """

    memory: Any
    window: Tensor | None = None
    saliency: Tensor | None = None
    logits: Tensor | None = None
    density: Tensor | None = None


class Localizer(nn.Module, ABC):
    """Looks at a pyramid of images, then predicts at any anchors: raw parameters ``(B, N, width)`` by field name.

    A localiser of your own is a subclass with ``level``, ``look`` and ``forward``. To start as the ViT its last layers
    are zero (`timm_apvit.patching.layers.ZeroLinear`), which is the identity, and so is a window of half-extent 1. No
    shape of a parameter may depend on N or on the size of the image.

    Args:
        fields: name -> width of what it is to predict.
        in_chans: image channels C.
        device: of the parameters.
        dtype: of the parameters.
        options: its own, as config.json holds them.

    Attributes:
        under_autocast: whether to look under the autocast that may surround the model; else it looks in float32.
        answers: whether its looks have logits.
        crowd: share of the density of its looks, within (0, `MOST_CROWD`], by which anchors crowd; the rest is even.
            0: its looks have none.
    """

    under_autocast: bool = False
    answers: bool = False
    crowd: float = 0.0

    def attach(self, vit: Any) -> None:
        """Get to know the ViT that it is to serve, which is otherwise ready; once, when a model is made."""

    def reset_classifier(self, num_classes: int) -> None:
        """The ViT has so many classes from now on; 0: none."""

    def specification(self, given: Any) -> Any:
        """What it was made by, a name or a mapping with one, so that the same makes it as it is now."""
        return given

    @abstractmethod
    def level(self, image_size: tuple[int, int]) -> int:
        """The coarsest mip level of an image ``(H, W)`` that it is to be given."""

    @abstractmethod
    def look(self, pyramid: list[Tensor]) -> Look:
        """Look at the mip levels of a batch, level k of ``(B, C, ceil(H / 2^k), ceil(W / 2^k))``, float32.

        There may be more of them than `level` asks for.
        """

    @abstractmethod
    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        """Predict at anchors, which lie in the window if there is one: field name -> ``(B, N, width)``, float32."""

    def fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Adapt a whole checkpoint of a localiser of this class, whose keys have a prefix, to this one, in place.

        Here what has other options is repaired: renamed, widened, of other channels. What is left as it is, loading
        compares strictly. Where layers by field name are in ``fields``, those that a smaller family lacks become zeros,
        and those that only a larger one has are left out if they are zero.
        """
        own = self.state_dict(prefix=prefix)
        predicted = {key.rpartition('.')[0] for key in state_dict if key.startswith(f'{prefix}fields.')}
        larger = {f'{prefix}fields.{field}' for family in TRANSFORMS.values() for field in family.fields}
        for field in (predicted & larger) - {name.rpartition('.')[0] for name in own}:
            keys = [key for key in state_dict if key.startswith(f'{field}.')]
            if not any(bool(state_dict[key].any()) for key in keys):
                for key in keys:
                    del state_dict[key]
        for name, value in own.items():
            field = name.rpartition('.')[0]
            # Every family predicts the shift: a checkpoint without it is not of a smaller family, but broken.
            if field.startswith(f'{prefix}fields.') and field not in predicted and not field.endswith('.shift'):
                state_dict[name] = torch.zeros_like(value)


class FeatureLocalizer(Localizer):
    """A localiser whose memory is features of places ``(B, D, h, w)``, which it reads where an anchor is.

    Attributes:
        from_anchor: of centre and logarithm of the half-extents of an anchor, to the features' width.
        fields: layers by the name of a field.
    """

    from_anchor: nn.Module
    fields: nn.ModuleDict

    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        """See `Localizer`."""
        grid = anchors.centres.expand(look.memory.shape[0], -1, -1).unsqueeze(1)
        there = grid_sample(look.memory, grid).squeeze(2).transpose(1, 2)  # (B, N, D)
        place = torch.cat([anchors.centres, torch.log(anchors.extents)], dim=-1)
        hidden = F.gelu(there + self.from_anchor(place))
        return {name: layer(hidden) for name, layer in self.fields.items()}


def coarsest_level(image_size: tuple[int, int], size: tuple[int, int]) -> int:
    """The coarsest mip level of an image ``(H, W)`` that is no smaller than a size on either side, if there is one."""
    level, (height, width) = 0, image_size
    while height >= 2 * size[0] and width >= 2 * size[1]:
        level, height, width = level + 1, (height + 1) // 2, (width + 1) // 2
    return level


LOCALIZERS: Parts[type[Localizer]] = Parts('localizer')


def register_localizer(name: str, localizer: type[Localizer]) -> None:
    """Add a class to `LOCALIZERS`, for ``create_model(..., localizer=name)`` or ``{'name': name, ...}`` with options.

    Whoever loads a model of it must have imported the file that registers it.

    Raises:
        ValueError: not a subclass of `Localizer`, methods that it lacks, or no name or that of another localiser.
    """
    if not (isinstance(localizer, type) and issubclass(localizer, Localizer)):
        raise ValueError(f'expected a subclass of Localizer, got {localizer!r}')
    missing = sorted(localizer.__abstractmethods__)
    if missing:
        raise ValueError(f'expected {localizer.__qualname__} to have level, look and forward, got none of {missing}')
    LOCALIZERS.register(name, localizer)
