"""Animations of what a model looks at."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from conftest import create
from PIL import Image

from timm_apvit.pictures import drawing
from timm_apvit.pictures.plots import animate, animate_training


def test_animation_has_a_frame_for_each_budget() -> None:
    model: Any = create(img_size=64, num_patches=16)
    file = animate(model, torch.rand(3, 40, 60), (1, 4, 100), seconds=0.5)
    with Image.open(io.BytesIO(file)) as gif:
        assert gif.format == 'GIF'
        assert gif.n_frames == 3
        assert gif.info['duration'] == 500
        assert gif.info['loop'] == 0


def frames_of(file: bytes) -> list[np.ndarray[Any, Any]]:
    with Image.open(io.BytesIO(file)) as gif:
        found = []
        for n in range(gif.n_frames):
            gif.seek(n)
            found.append(np.asarray(gif.convert('RGB')).astype(int))
    return found


def test_colours_mean_the_same_in_all_frames_and_white_is_white(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = create(img_size=64, num_patches=16)
    image = torch.rand(3, 40, 60)
    image[:, :20] = 253 / 255  # so much near white that the colours of the frames have it
    figures: list[Any] = []
    drawn = drawing.rendered

    def rendered(figure: Any, dpi: int) -> Any:
        figures.append(figure)
        return drawn(figure, dpi)

    monkeypatch.setattr(drawing, 'rendered', rendered)
    panels = ('outlines', 'coverage')
    frames = frames_of(animate(model, image, (1, 16), panels=panels, color_by='attention'))
    for frame in frames:
        assert (frame[:2] == 255).all()  # the margin
        assert (frame == 253).all(axis=-1).any()
    for name in ('patches', 'attention (1: an even share)'):
        limits = [axis.get_ylim() for figure in figures for axis in figure.axes if axis.get_ylabel() == name]
        assert len(limits) == 2
        assert limits[0] == limits[1]
    most = [axis.images[0].get_clim() for figure in figures for axis in figure.axes if len(axis.images) and axis.axison]
    assert most[1] == most[3]


def test_animation_of_a_training_has_a_frame_for_each_model_that_shows_its_own_patches() -> None:
    still: Any = create(img_size=64, num_patches=4)
    moved = copy.deepcopy(still)
    with torch.no_grad():
        moved.patch_embed.patching.localizer.fields['shift'].bias.fill_(1.0)
    image = torch.rand(3, 40, 60)
    models = ((name, model) for name, model in (('epoch-1', still), ('epoch-2', still), ('epoch-3', moved)))
    frames = frames_of(animate_training(models, image, 9, panels=('outlines',)))
    assert len(frames) == 3
    drawn = [frame[len(frame) // 4 :] for frame in frames]  # without the titles
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.1 * np.abs(drawn[1] - drawn[2]).mean()
    assert still.num_patches == 4
