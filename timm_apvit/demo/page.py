"""A page on which one sees what a model looks at. Needs Gradio."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_apvit.failures import one_line, require
from timm_apvit.finetuning.baseline import create_baseline
from timm_apvit.finetuning.evaluation import images_per_second
from timm_apvit.finetuning.models import address_of, create_model
from timm_apvit.finetuning.settings import Settings
from timm_apvit.hub.labels import class_names, probabilities
from timm_apvit.models.attention import attends
from timm_apvit.models.mixin import APViT
from timm_apvit.patching.transforms import TRANSFORMS
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.images import image_config, read_image
from timm_apvit.pictures.plots import COLOURED_BY, plot_patches
from timm_apvit.pictures.views import at_rest, normalised

EXAMPLES = Path(__file__).parent / 'examples'
OWN = "the model's own"
DPI, BEST = 110, 5
UNREAD = '. The attention of this model cannot be read.'
# Models that stay loaded, and seconds for which each is timed.
KEPT, SECONDS = 4, 0.3


class Seen(NamedTuple):
    """What the page shows of an image.

    Attributes:
        picture: outlines, patches and the fixed grid, ``(h, w, 3)``, bytes.
        classes: probabilities of the likeliest classes by their names; None: the model has no classifier.
        times: a sentence.
    """

    picture: Any
    classes: dict[str, float] | None
    times: str


class Viewer:
    """Models by their names, and what each sees.

    Args:
        random: whether registered models have random weights, which need no network, and patches at random.
        device: of the models.
    """

    def __init__(self, random: bool = False, device: str = 'cpu') -> None:
        self.random, self.device = random, device
        self._lock = threading.Lock()  # a model has one number of patches at a time
        self.load: Callable[[str, str | None], APViT] = lru_cache(KEPT)(self._load)

    def _load(self, name: str, transform: str | None) -> APViT:
        if not name:
            raise ValueError('expected a model, got none')
        address = address_of(name)
        random = self.random and address == name
        torch.manual_seed(0)
        model: APViT = create_model(Settings(model=address, transform=transform), None, not random)
        if random:
            for layer in model.patch_embed.patching.localizer.fields.values():
                torch.nn.init.normal_(layer.weight, std=0.2)
        model.to(self.device).eval()
        return model

    def numbers(self, name: str, transform: str = OWN) -> tuple[int, int]:
        """The most patches that the page offers, those of the base grid or of the model, and those that it has."""
        with self._lock:
            model = self.load(name, None if transform == OWN else transform)
            rows, columns = model.patch_embed.grid_size
            return max(rows * columns, model.num_patches), model.num_patches

    @torch.inference_mode()
    def see(self, name: str, transform: str, source: Any, num_patches: int, color_by: str) -> Seen:
        """What a model sees of an image with so many patches.

        Raises:
            ValueError, OSError: no such model, image or number, in a sentence.
        """
        with self._lock:
            model = self.load(name, None if transform == OWN else transform)
            image = read_image(source, image_config(model)['input_size'][0])
            unread = color_by == 'attention' and not attends(model)
            # Else it has the layout that it was made with.
            with at_rest(model, None if num_patches == model.num_patches else num_patches):
                colour = 'order' if unread else color_by
                figure = plot_patches(model, image, panels=('outlines', 'adaptive', 'fixed'), color_by=colour)
                batch = normalised(model, image)
                classes = likeliest(model, model(batch)) if model.num_classes else None
                times = self._times(model, batch) + UNREAD * unread
        return Seen(load_drawing().rendered(figure, DPI), classes, times)

    def _times(self, model: APViT, batch: Tensor) -> str:
        baseline = create_baseline(model).to(self.device).eval()
        own, fixed = (
            1000 / images_per_second(lambda each=each: each(batch), 1, SECONDS)  # type: ignore[misc]
            for each in (model, baseline)
        )
        grid = 'x'.join(map(str, baseline.patch_embed.grid_size))  # type: ignore[union-attr, arg-type]
        return f'{own:.1f} ms an image; {fixed:.1f} ms for the ViT on a fixed grid of {grid} of the image made smaller'


def likeliest(model: APViT, logits: Tensor) -> dict[str, float]:
    """The likeliest classes by their names, and their probabilities."""
    names, found = class_names(model), probabilities(model, logits)[0].topk(min(BEST, model.num_classes))
    likely = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    # Two of ImageNet's classes are cranes.
    return {names[n] + f' ({n})' * (names.count(names[n]) > 1): value for n, value in likely}


def page(viewer: Viewer, model: str) -> Any:
    """The page, as a ``gradio.Blocks``."""
    require('gradio', 'the demo', "'timm-apvit[demo]'")
    import gradio

    def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            try:
                return act(*values)
            except (ValueError, TypeError, OSError, ImportError) as error:
                raise gradio.Error(one_line(error), title='This does not work') from error

        return run

    def changed(name: str, transform: str) -> Any:
        most, own = viewer.numbers(name, transform)
        return gradio.Slider(maximum=most, value=own)

    def shown(name: str, transform: str, source: str | None, number: float, color_by: str) -> Any:
        if source is None:
            return None, None, 'Take one of the examples, or drop a photograph.'
        return viewer.see(name, transform, source, int(number), color_by)

    most, own = viewer.numbers(model)
    registered = ['apvit_tiny', 'apvit_small', 'apvit_base', 'apvit_small_patch14_dinov2']
    with gradio.Blocks(title='timm_apvit', analytics_enabled=False) as blocks:
        gradio.Markdown('# Where a Vision Transformer with adaptive patches looks')
        with gradio.Row():
            with gradio.Column(scale=1):
                source = gradio.Image(label='Photograph', sources=['upload', 'clipboard'], type='filepath')
                # The path of the file, whatever is in it: what is wrong with it we say ourselves.
                source.preprocess = lambda payload: None if payload is None else payload.path
                gradio.Examples([[str(path)] for path in sorted(EXAMPLES.glob('*.jpg'))], [source])
                name = gradio.Dropdown(
                    list(dict.fromkeys([model, *registered])), value=model, allow_custom_value=True, label='Model'
                )
                number = gradio.Slider(1, most, own, step=1, label='Patches')
                transform = gradio.Dropdown([OWN, *TRANSFORMS], value=OWN, label='What a patch may do')
                color_by = gradio.Radio(list(COLOURED_BY), value=COLOURED_BY[0], label='Colour by')
            with gradio.Column(scale=2):
                picture = gradio.Image(show_label=False, format='png')
                times = gradio.Markdown()
                classes = gradio.Label(label='Classes', num_top_classes=BEST)
        inputs, outputs = [name, transform, source, number, color_by], [picture, classes, times]
        see = guarded(shown)
        for each in (source.change, color_by.change, number.release):
            each(see, inputs, outputs)
        for each in (name.change, transform.change):
            each(guarded(changed), [name, transform], number).success(see, inputs, outputs)
    return blocks
