"""Does a device compute what the CPU does? Checks for `gpu.py`, each of which measures a figure that has a limit."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from speed import randomised
from timing import peak_memory
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import timm_apvit


class Found(NamedTuple):
    """A figure that must not exceed a limit; text says what it is."""

    text: str
    figure: float
    limit: float


class Setting(NamedTuple):
    """Where and on what the checks run.

    Attributes:
        device: of the models.
        name: of an APViT.
        compiler: of ``torch.compile``; None: it is not tried.
    """

    device: str
    name: str = 'apvit_small'
    compiler: str | None = 'inductor'

    def model(self, **kwargs: Any) -> Any:
        """An APViT whose patches have moved, on the CPU, in eval mode; the same for the same arguments."""
        torch.manual_seed(0)
        return randomised(timm.create_model(self.name, **{'num_patches': 98, **kwargs})).eval()

    def images(self, batch: int = 4) -> Tensor:
        """Noise with as much in coarse as in fine structures, as photographs have; on the CPU."""
        generator = torch.Generator().manual_seed(1)
        octaves = (torch.randn(batch, 3, side, side, generator=generator) for side in (4, 8, 16, 32, 64))
        return sum(
            (nn.functional.interpolate(each, (224, 224), mode='bicubic') for each in octaves), torch.zeros(())
        ) / 2  # fmt: skip

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.startswith('cuda')


class NotHereError(Exception):
    """A check that this machine cannot run; the message says why."""


def identity(setting: Setting) -> Found:
    """Against timm's ViT, at its own grid."""
    vit = timm.create_model(timm_apvit.vit_name(setting.name)).eval().to(setting.device)
    image = setting.images()[..., : vit.patch_embed.img_size[0], : vit.patch_embed.img_size[1]].to(setting.device)
    with torch.inference_mode():
        theirs = vit.forward_features(image)
        ours = timm_apvit.adapt(vit).forward_features(image)
    return Found('features of the identity against the ViT, relative', distance(ours, theirs), 1e-4)


def forward(setting: Setting) -> Found:
    """Patches that have moved, against the CPU."""
    model, image = setting.model(), setting.images()
    with torch.inference_mode():
        theirs = model.forward_features(image)
        ours = model.to(setting.device).forward_features(image.to(setting.device))
    return Found('features against the CPU, relative', distance(ours, theirs), 1e-3)


def gradients(setting: Setting, localizer: Any, of_localizer: bool, num_patches: int = 98) -> Found:
    """Of the localiser, or of all else, against the CPU."""
    found = []
    for device in ('cpu', setting.device):
        model = setting.model(localizer=localizer, num_patches=num_patches).to(device)
        model(setting.images().to(device)).square().sum().backward()
        learnt = ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
        found.append(torch.cat([grad.flatten().cpu() for name, grad in learnt if ('patching' in name) == of_localizer]))
    # Rounding moves samples over the edge of a pixel, where the gradient of a bilinear read jumps: on a CPU, noise of
    # 3e-6 on the image changes that of the localisation network by 0.007, all others by 4e-6.
    what = f'gradients of {"the" if of_localizer else "all but the"} {localizer} against the CPU, relative'
    return Found(what, distance(found[1], found[0]), 0.05 if of_localizer else 1e-3)


def deterministic(setting: Setting) -> Found:
    """Two training steps in PyTorch's deterministic mode are one to the bit."""
    model, image = setting.model(jitter=0.1).train().to(setting.device), setting.images().to(setting.device)
    steps = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(2)
            model.zero_grad()
            model(image).square().sum().backward()
            steps.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    differing = sum(not torch.equal(*pair) for pair in zip(*steps, strict=True))
    return Found('gradients that differ between two deterministic steps', differing, 0)


def half(setting: Setting, dtype: torch.dtype) -> Found:
    """Error of a dtype under autocast, against the ViT's own."""
    vit = timm.create_model(timm_apvit.vit_name(setting.name)).eval().to(setting.device)
    model, image = setting.model().to(setting.device), setting.images().to(setting.device)
    image = image[..., : vit.patch_embed.img_size[0], : vit.patch_embed.img_size[1]]
    errors = []
    with torch.inference_mode():
        for each in (model, vit):
            exact = each.forward_features(image)
            with torch.autocast(setting.device.partition(':')[0], dtype):
                errors.append(distance(each.forward_features(image), exact))
    return Found(f"error in {str(dtype).partition('.')[2]} against the ViT's own", errors[0] / errors[1], 1.5)


def compiled(setting: Setting) -> Found:
    """One graph for all sizes of batches, with what eager gives."""
    if setting.compiler is None:
        raise NotHereError('not compiled at reduced size')
    torch.compiler.reset()
    model, counter = setting.model().to(setting.device), CompileCounterWithBackend(setting.compiler)
    run = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    image, worst = setting.images(7).to(setting.device), 0.0
    with torch.inference_mode():
        for batch in (2, 3, 7, 5):
            worst = max(worst, distance(run(image[:batch]), model(image[:batch])))
    graphs = counter.frame_count
    text = f'compiled, four sizes of batches in {graphs} graph(s), which must be 1: logits against eager, relative'
    return Found(text, worst if graphs == 1 else float('inf'), 2e-3)


def cuda_graph(setting: Setting) -> Found:
    """A graph captured once, with images that came later."""
    if not setting.is_cuda:
        raise NotHereError('CUDA graphs need CUDA')
    model, image = setting.model().to(setting.device), setting.images().to(setting.device)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(image)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(image)
        image.copy_(image.flip(-1))
        graph.replay()
        return Found('a CUDA graph on other images against eager, relative', distance(captured, model(image)), 1e-4)


def channels_last(setting: Setting) -> Found:
    """Weights and images in channels-last."""
    model, image = setting.model().to(setting.device), setting.images().to(setting.device)
    with torch.inference_mode():
        exact = model(image)
        form = torch.channels_last
        other = copy.deepcopy(model).to(memory_format=form)(image.contiguous(memory_format=form))
    return Found('channels-last against contiguous logits, relative', distance(other, exact), 1e-3)


def memory(setting: Setting) -> Found:
    """Peak of a training step, against the ViT's."""
    if not setting.is_cuda:
        raise NotHereError("peaks are those of CUDA's allocator; on CPU: cost.py")
    image, peaks = setting.images(16).to(setting.device), []
    for model in (setting.model(num_patches=None), timm.create_model(timm_apvit.vit_name(setting.name))):
        model = model.train().to(setting.device)
        peaks.append(peak_memory(lambda own=model: own(image).square().mean().backward(), setting.device))
    return Found('peak memory of a training step against that of the ViT', peaks[0] / peaks[1], 1.2)


def learns(setting: Setting) -> Found:
    """Ten steps of AdamW on one batch, in float16 with a scaler on a GPU."""
    model = setting.model(num_classes=4, localizer='glance').train().to(setting.device)
    image, labels = setting.images().to(setting.device), torch.arange(4, device=setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler, losses = torch.amp.GradScaler(enabled=setting.is_cuda), []
    for _ in range(10):
        with torch.autocast('cuda', torch.float16, enabled=setting.is_cuda):
            loss = nn.functional.cross_entropy(model(image).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return Found('loss after ten steps against the first', losses[-1] / losses[0], 0.9)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference relative to that of the second; infinite if a number is none."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    value = ((ours - theirs).norm() / theirs.norm()).item()
    return value if value == value else float('inf')


CHECKS: dict[str, Callable[[Setting], Found]] = {
    'identity': identity,
    'forward': forward,
    'gradients': lambda setting: gradients(setting, 'cnn', False),
    'gradients, localiser': lambda setting: gradients(setting, 'cnn', True),
    'gradients, glance': lambda setting: gradients(setting, 'glance', True),
    'gradients, crowd': lambda setting: gradients(setting, 'saliency', True, 100),
    'deterministic': deterministic,
    'bfloat16': lambda setting: half(setting, torch.bfloat16),
    'float16': lambda setting: half(setting, torch.float16),
    'channels-last': channels_last,
    'CUDA graph': cuda_graph,
    'memory': memory,
    'learns': learns,
    'compiled': compiled,
}
