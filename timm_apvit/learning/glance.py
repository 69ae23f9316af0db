"""A head start for ``localizer='glance'``: what reads the ViT's tokens is fitted before the ViT itself learns."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.failures import explain, one_line
from timm_apvit.models.glance import GlanceLocalizer, answer_of, glances
from timm_apvit.models.mixin import APViT, check_apvit, in_eval_mode
from timm_apvit.patching.coords import check_count, in_float32
from timm_apvit.patching.sampling import mip_pyramid

# Share of the tokens' features that are dropped: it is fitted on few images.
DROPOUT = 0.2
# Images of an update.
BATCH_SIZE = 64


def fit_glance(
    model: APViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int = 10,
    lr: float = 2e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    most_images: int = 20_000,
) -> float:
    """Fit what tells the classes from the tokens of a glance, before the model is trained as a whole.

    The ViT stays as it is, so every image goes through its first blocks once, and its tokens are kept: that takes as
    long as half a pass of the images without gradients, and their memory (144 tokens of a ViT-S 110 kB an image, on the
    CPU). The first updates of the training then look where there is something to see.

    Args:
        model: with ``localizer='glance'`` and pretrained weights; trained in place, where it is.
        batches: images ``(B, C, H, W)`` of one size, and what the loss takes beside the glance's answers
            ``(B, classes)``, such as labels ``(B,)``.
        epochs: over the glances.
        lr: the highest learning rate; it rises and falls once.
        loss: of a batch.
        most_images: further ones are left out.

    Returns:
        The mean loss of the last epoch.

    Raises:
        ValueError: a model without a glance, in float16 or frozen, epochs below 1, no images or such as the model
            refuses, targets that are not of the answers, or a loss that is not a finite number: nothing is learnt then.
    """
    if loss is F.cross_entropy and glance_of(model).told[-1] == 0:
        raise ValueError(
            'expected a model with classes, or a loss of pooled features, got cross_entropy without classes'
        )
    return fit_evidence(
        model, batches, lambda evidence, targets: loss(answer_of(evidence), targets), epochs, lr, most_images
    )


def fit_evidence(
    model: APViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float,
    most_images: int,
) -> float:
    """As `fit_glance`, for a loss of evidence ``(B, places, classes)``."""
    localizer = glance_of(model)
    check_count('epochs', epochs)
    check_count('most_images', most_images)
    if next(localizer.parameters()).dtype == torch.float16:
        raise ValueError('expected parameters in float32 or bfloat16, got float16, in which fitting overflows')
    tokens, targets = _seen(model, localizer, batches, most_images)
    parts = (localizer.norm, localizer.evidence, localizer.score, localizer.classes)
    parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError('expected parameters of the glance that learn, got all of them frozen')
    device = next(model.parameters()).device
    steps = epochs * -(-len(tokens) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    losses: list[Tensor] = []
    # Autocast keeps the first rounding of the weights for as long as it lasts, and would not see them learn.
    with _undone_by_failure(parameters), torch.enable_grad(), in_float32(device):
        for _ in range(epochs):
            losses = []
            for chosen in torch.split(torch.randperm(len(tokens)), BATCH_SIZE):
                batch = tokens[chosen].to(device).float()
                evidence = localizer.evidence_of(F.dropout(localizer.norm(batch), DROPOUT))
                value = _finite(loss, evidence, targets[chosen].to(device))
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(value.detach())
    optimizer.zero_grad()
    return float(torch.stack(losses).mean())


@torch.no_grad()
def collapsed(model: APViT, images: Tensor) -> str | None:
    """What is wrong with where images ``(B, C, H, W)`` are looked at, in a sentence; None: it differs, or they are few.

    A glance that found nothing sees all images whole, or evenly; one whose window became a habit looks at the same
    place in all of them.

    Raises:
        ValueError: a model without a glance.
    """
    glance_of(model)
    with in_eval_mode(model):
        geometry = model.patch_geometry(images)
    window, saliency = geometry.window, geometry.saliency
    if window is None:  # patches crowd instead
        flat = saliency is not None and bool((saliency.amax(dim=(1, 2)) - saliency.amin(dim=(1, 2)) < 0.01).all())
        return 'The glance finds nothing yet: all places matter alike.' if flat and len(images) >= 8 else None
    if len(window) < 8:
        return None
    if (window[:, 2] == 1).all():
        return 'The glance finds nothing yet: all images are seen whole.'
    if window.std(dim=0).max() < 0.01:
        return f'The glance looks at the same place in all images: {[round(v, 2) for v in window[0].tolist()]}.'
    return None


def glance_of(model: APViT) -> GlanceLocalizer:
    """The localiser of a model that glances; ValueError if it does not."""
    check_apvit(model)
    localizer: GlanceLocalizer = model.patch_embed.patching.localizer
    if not glances(model):
        raise ValueError(f"expected a model with localizer='glance', got one with a {type(localizer).__name__}")
    return localizer


@torch.no_grad()
def _seen(
    model: APViT, localizer: GlanceLocalizer, batches: Iterable[tuple[Tensor, Tensor]], most: int
) -> tuple[Tensor, Tensor]:
    """Tokens ``(n, T, D)`` of the glances at some images, in half the memory, and what is to be learnt."""
    device = next(model.parameters()).device
    tokens, targets = [], []
    with in_eval_mode(model):
        for batch in batches:
            if not isinstance(batch, Sequence) or [isinstance(each, Tensor) for each in batch] != [True, True]:
                raise ValueError(f'expected batches of two tensors, images and targets, got {type(batch).__name__}')
            images, wanted = batch
            model.patch_embed.patching.check_image(images)
            canvas = model.patch_embed.on_canvas(images.to(device).float())
            pyramid = mip_pyramid(canvas, localizer.level((canvas.shape[2], canvas.shape[3])) + 1)
            tokens.append(localizer.tokens(pyramid)[0].to('cpu', torch.bfloat16))
            targets.append(wanted)
            if not tokens[-1].isfinite().all():
                raise ValueError('expected images and weights whose tokens are finite numbers, got others')
            if len(wanted) != len(images) or tokens[-1].shape[1] != tokens[0].shape[1]:
                raise ValueError(
                    f'expected images of one size, each with its target, got {list(images.shape)} and {len(wanted)}'
                )
            if sum(map(len, tokens)) >= most:
                break
    if not sum(map(len, tokens)):
        raise ValueError('expected batches of images, got none')
    return torch.cat(tokens)[:most], torch.cat(targets)[:most]


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


def _finite(loss: Callable[[Tensor, Tensor], Tensor], evidence: Tensor, targets: Tensor) -> Tensor:
    """A loss; ValueError unless it is a finite number."""
    try:
        value = loss(evidence, targets)
    except (RuntimeError, IndexError) as error:
        if explain(error) != one_line(error):  # out of memory
            raise
        of = f'{list(evidence.shape)} and targets {list(targets.shape)}'
        raise ValueError(
            f'expected targets of the answers, got a loss of evidence {of} that fails: {one_line(error)}'
        ) from error
    if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
        raise ValueError(f'expected a loss that is a finite number, got {value!r:.80}')
    return value
