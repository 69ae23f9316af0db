"""Where the time of an APViT goes: its functions, timed while it runs."""

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import nn

from timm_apvit.models import patch_embed
from timm_apvit.patching import layer as patching
from timm_apvit.patching import pos_embed
from timm_apvit.patching.geometry import PatchGeometry

REST = 'everything else'


def time_parts(model: nn.Module, step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Medians of the milliseconds of a step's forward that each part takes. On a GPU this times the launches alone."""
    embed = model.patch_embed
    owners: list[tuple[str, Any, str]] = [
        ('pyramid', patching, 'mip_pyramid'),
        ('localiser: look', embed.patching.localizer, 'look'),
        ('localiser: predict', embed.patching.localizer, 'forward'),
        ('geometry: place', embed.patching.transform, 'forward'),
        ('geometry: points', PatchGeometry, 'points'),
        ('geometry: footprint', patching, 'patch_jacobians'),
        ('geometry: footprint', patching, 'footprint'),
        ('sampling', patching, 'sample_patches'),
        ('projection', embed, '_project'),
        ('geometry: embedding', patch_embed, 'geometry_features'),
        ('position', pos_embed, 'interpolate_pos_embed'),
        ('position', pos_embed, 'resample_pos_embed'),
        *(('blocks', block, 'forward') for block in model.blocks),
    ]
    spent: dict[str, float] = dict.fromkeys([name for name, *_ in owners] + [REST], 0.0)
    found: dict[str, list[float]] = {name: [] for name in spent}
    with ExitStack() as stack:
        for name, owner, attribute in owners:
            stack.enter_context(mock.patch.object(owner, attribute, _timed(getattr(owner, attribute), name, spent)))
        for round_ in range(rounds + 1):
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            step()
            spent[REST] = time.perf_counter() - start - sum(spent.values())
            if round_ > 0:
                for name, seconds in spent.items():
                    found[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return timed
