"""A head start for ``localizer='glance'``: what reads the ViT's tokens is fitted before the ViT itself learns."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.failures import explain, one_line
from timm_apvit.learning.fitting import fit_parameters, learning_parameters, pyramids
from timm_apvit.models.glance import GlanceLocalizer, answer_of, glances
from timm_apvit.models.mixin import APViT, check_apvit, in_eval_mode
from timm_apvit.patching.coords import check_count

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
    localizer = glance_of(model)
    check_count('epochs', epochs)  # before it takes its time to look
    check_count('most_images', most_images)
    parts = (localizer.norm, localizer.evidence, localizer.score, localizer.classes)
    parameters = learning_parameters(*parts)
    tokens, targets = _seen(model, localizer, batches, most_images)
    device = parameters[0].device

    def losses() -> Iterator[Tensor]:
        for chosen in torch.split(torch.randperm(len(tokens)), BATCH_SIZE):
            batch = tokens[chosen].to(device).float()
            evidence = localizer.evidence_of(F.dropout(localizer.norm(batch), DROPOUT))
            yield _checked(loss, answer_of(evidence), targets[chosen].to(device))

    return fit_parameters(parameters, losses, -(-len(tokens) // BATCH_SIZE), epochs, lr)


@torch.no_grad()
def collapsed(model: APViT, images: Tensor) -> str | None:
    """What is wrong with where images ``(B, C, H, W)`` are looked at, in a sentence; None: it differs, or they are few.

    A glance that found nothing sees all images whole; one whose window became a habit looks at the same place in all
    of them.

    Raises:
        ValueError: a model without a glance.
    """
    glance_of(model)
    with in_eval_mode(model):
        window: Tensor = model.patch_geometry(images).window  # type: ignore[assignment]
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
    tokens, targets = [], []
    with in_eval_mode(model):
        for pyramid, wanted in pyramids(model, batches):
            tokens.append(localizer.tokens(pyramid)[0].to('cpu', torch.bfloat16))
            targets.append(wanted)
            if not tokens[-1].isfinite().all():
                raise ValueError('expected images and weights whose tokens are finite numbers, got others')
            if tokens[-1].shape[1] != tokens[0].shape[1]:
                raise ValueError(f'expected images of one size, got also one of {list(pyramid[0].shape[2:])}')
            if sum(map(len, tokens)) >= most:
                break
    if not sum(map(len, tokens)):
        raise ValueError('expected batches of images, got none')
    return torch.cat(tokens)[:most], torch.cat(targets)[:most]


def _checked(loss: Callable[[Tensor, Tensor], Tensor], answer: Tensor, targets: Tensor) -> Tensor:
    """A loss; ValueError if the targets are not of the answers."""
    try:
        return loss(answer, targets)
    except (RuntimeError, IndexError) as error:
        if explain(error) != one_line(error):  # out of memory
            raise
        of = f'{list(answer.shape)} and targets {list(targets.shape)}'
        raise ValueError(
            f'expected targets of the answers, got a loss of answers {of} that fails: {one_line(error)}'
        ) from error
