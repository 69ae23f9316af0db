"""What a model attends to, read from outside while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


@contextmanager
def calls_of(module: nn.Module | None) -> Iterator[list[tuple[Any, Any]]]:
    """Collect the first argument and the result of each call of a module, if there is one."""
    seen: list[tuple[Any, Any]] = []
    handle = module and module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        yield seen
    finally:
        if handle:
            handle.remove()


def attends(model: nn.Module) -> bool:
    """Whether it is known how a model attends to its patches: with timm's ordinary attention in its last block."""
    return isinstance(model, VisionTransformer) and isinstance(getattr(model.blocks[-1], 'attn', None), Attention)


def patch_attention(model: Any, layer: Any, tokens: Tensor) -> Tensor:
    """Attention to each patch: ``(B, T + N, D)`` -> ``(B, N)``, sums of 1.

    That of the class token if the classifier takes it, or else of the mean patch; the mean over the heads, computed
    from what the attention layer took: fused attention shows no weights.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        shape = *tokens.shape[:2], 3, layer.num_heads, -1
        tokens = tokens.to(getattr(layer.qkv.weight, 'dtype', torch.float32))  # quantised layers take float32
        query, key, _ = layer.qkv(tokens).view(shape).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T + N, d)
        query, key = layer.q_norm(query).float(), layer.k_norm(key).float()
        query = query[:, :, :1] if model.global_pool == 'token' else query[:, :, model.num_prefix_tokens :]
        attention = torch.softmax(query * layer.scale @ key.transpose(-2, -1), dim=-1)
        received: Tensor = attention[..., model.num_prefix_tokens :].mean(dim=(1, 2))
    return received / received.sum(dim=-1, keepdim=True)
