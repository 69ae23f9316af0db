"""What it takes to fit a localiser before the ViT learns: images as it sees them, and updates of its own parameters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_apvit.models.mixin import APViT
from timm_apvit.patching.coords import check_count, check_number, in_float32
from timm_apvit.patching.sampling import mip_pyramid


def pyramids(model: APViT, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What a localiser looks at, the mip levels ``(B, C, h, w)`` of images on the model's device, and their targets.

    Raises:
        ValueError: not two tensors of one length, images ``(B, C, H, W)`` and targets ``(B, ...)``.
    """
    patching = model.patch_embed.patching
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, Sequence) or [isinstance(each, Tensor) for each in batch] != [True, True]:
            raise ValueError(f'expected batches of two tensors, images and targets, got {type(batch).__name__}')
        images, target = batch
        patching.check_image(images)
        if target.shape[:1] != images.shape[:1]:
            raise ValueError(f'expected a target for each image, got {list(images.shape)} and {list(target.shape)}')
        canvas = model.patch_embed.on_canvas(images.to(device).float())
        yield mip_pyramid(canvas, patching.localizer.level((canvas.shape[2], canvas.shape[3])) + 1), target


def learning_parameters(*parts: nn.Module) -> list[nn.Parameter]:
    """Those of parts of a localiser that are not frozen; ValueError if there are none, or in float16."""
    parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError('expected parameters of the localizer that learn, got all of them frozen')
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        raise ValueError('expected parameters in float32 or bfloat16, got float16, in which fitting overflows')
    return parameters


def fit_parameters(
    parameters: Sequence[nn.Parameter], losses: Callable[[], Iterator[Tensor]], steps: int, epochs: int, lr: float
) -> float:
    """Lower losses by AdamW under one cycle of the learning rate; if one fails, all is undone.

    Args:
        parameters: that learn, of one device.
        losses: of an epoch's batches, one after the other, each by the parameters as they are then.
        steps: how many an epoch has.
        epochs: over them.
        lr: the highest learning rate.

    Returns:
        The mean loss of the last epoch.

    Raises:
        ValueError: epochs below 1, none of the losses, or one that is not a finite number of parameters that learn.
    """
    total, lr = check_count('epochs', epochs) * steps, check_number('lr', lr, 0)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total + 1)
    # Autocast keeps the first rounding of the weights for as long as it lasts, and would not see them learn.
    with _undone_by_failure(parameters), torch.enable_grad(), in_float32(parameters[0].device):
        for _ in range(epochs):
            values: list[Tensor] = []
            for value in losses():
                if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
                    raise ValueError(f'expected a loss that is a finite number, got {value!r:.80}')
                if not value.requires_grad:
                    raise ValueError('expected a loss of parameters that learn, got one of none')
                optimizer.zero_grad()
                value.backward(inputs=list(parameters))  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                values.append(value.detach())
            if not values:
                raise ValueError('expected batches of images in each epoch, got none')
    optimizer.zero_grad()
    return float(torch.stack(values).mean())


@contextmanager
def _undone_by_failure(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters their values back, and no gradients, if what learns them fails."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        raise
