"""Recipes that are too long to run here: their options are sound and their models can be built."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from timm_apvit.cli.main import PROGRAM, make_parser
from timm_apvit.finetuning.config import with_config
from timm_apvit.finetuning.evaluation import multiply_adds
from timm_apvit.finetuning.models import create_model
from timm_apvit.finetuning.preparation import check_settings, with_defaults
from timm_apvit.finetuning.settings import Settings

RECIPE = Path(__file__).parents[2] / 'benchmarks/recipes/imagenet1k.yaml'


@pytest.mark.slow
@pytest.mark.parametrize('size', ['small', 'base', 'large'])
def test_imagenet_recipe_is_sound_and_costs_what_it_says(size: str) -> None:
    text = RECIPE.read_text()
    # The words that the recipe's own comments add for this model.
    more = '' if size == 'small' else re.search(rf'#     (--model apvit_{size}.*)\n', text)[1]  # type: ignore[index]
    words = ['finetune', '/data/imagenet', '--config', str(RECIPE), *shlex.split(more)]
    given = vars(make_parser(PROGRAM).parse_args(words))
    options = Settings(
        **with_config({name: value for name, value in given.items() if name not in ('command', 'parser')})
    )
    check_settings(options)
    assert options.model == f'apvit_{size}.augreg_in21k_ft_in1k'
    assert with_defaults(options).lr == options.lr == 1e-5

    costs = []
    with torch.device('meta'):
        model = create_model(options, 1000).eval()
        for budget in options.num_patches or ():
            model.set_num_patches(budget)
            image = torch.randn(1, 3, 224, 224)
            assert model(image).shape == (1, 1000)
            costs.append(multiply_adds(model, image) / 1e9)
    fewer, more_patches = costs
    step = 3 * (fewer + more_patches) / 2 + more_patches
    total = 1251 * 1024 * 30 * step + 30 * 50_000 * (fewer + more_patches)
    row = re.search(rf'#     apvit_{size} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)\n', text)
    assert row is not None
    said = [float(number) for number in row.groups()]
    assert said[:3] == [pytest.approx(cost, abs=0.01) for cost in (fewer, more_patches, step)]
    assert said[3] == pytest.approx(total / 1e9, abs=0.01)
    assert said[4] == pytest.approx(2 * total * 1e9 / 50e12 / 3600, rel=0.02)
    assert 'THIS HAS NOT BEEN RUN' in text
