"""Animations of what a model looks at."""

import copy
import io
from typing import Any

import numpy as np
import torch
from conftest import create
from PIL import Image

from timm_apvit.visualize import animate, animate_training


def test_animation_has_a_frame_for_each_budget() -> None:
    model: Any = create(img_size=64, num_patches=16)
    file = animate(model, torch.rand(3, 40, 60), (1, 4, 100), seconds=0.5)
    with Image.open(io.BytesIO(file)) as gif:
        assert gif.format == 'GIF'
        assert gif.n_frames == 3
        assert gif.info['duration'] == 500
        assert gif.info['loop'] == 0


def test_animation_of_a_training_has_a_frame_for_each_model_that_shows_its_own_patches() -> None:
    still: Any = create(img_size=64, num_patches=4)
    moved = copy.deepcopy(still)
    with torch.no_grad():
        moved.patch_embed.patching.localizer.fields['shift'].bias.fill_(1.0)
    image = torch.rand(3, 40, 60)
    models = ((name, model) for name, model in (('epoch-1', still), ('epoch-2', still), ('epoch-3', moved)))
    with Image.open(io.BytesIO(animate_training(models, image, 9, panels=('outlines',)))) as gif:
        assert gif.n_frames == 3
        frames = []
        for n in range(3):
            gif.seek(n)
            frames.append(np.asarray(gif.convert('L'), dtype=float))
    drawn = [frame[len(frame) // 4 :] for frame in frames]  # without the titles
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.1 * np.abs(drawn[1] - drawn[2]).mean()
    assert still.num_patches == 4
