"""Teachers by name, and what of them can be learned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

import timm_apvit
from timm_apvit.finetuning.models import start_model
from timm_apvit.finetuning.preparation import resolve_settings
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.teachers import create_teacher
from timm_apvit.pictures.images import image_config

BASE = Settings(model='test_apvit', img_size=32, num_patches=(2,), model_kwargs={'depth': 2})


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of ViTs with 10 and with 3 classes, and a model in a folder."""
    folder = tmp_path_factory.mktemp('weights')
    for classes in (10, 3):
        vit = randomise(timm.create_model('test_vit', img_size=32, depth=2, num_classes=classes), seed=classes)
        save_file(vit.state_dict(), folder / f'{classes}.safetensors')
    wide = timm.create_model('test_apvit', img_size=64, depth=1, embed_dim=32, num_classes=10)
    wide.pretrained_cfg['mean'] = (0.1, 0.2, 0.3)
    timm_apvit.save_pretrained(wide, folder / 'narrow')
    return folder


def distillation(files: Path, **options: Any) -> Any:
    options = {key: value.format(files) if isinstance(value, str) else value for key, value in options.items()}
    settled = replace(BASE, **options)
    start = start_model(settled, 10)
    made = create_teacher(settled, start, image_config(start.model))
    assert made is not None
    return made


def test_no_teacher_no_distillation() -> None:
    start = start_model(BASE, 10)
    assert create_teacher(BASE, start, image_config(start.model)) is None


def test_self_is_the_dense_vit_of_the_starting_weights(files: Path) -> None:
    made = distillation(files, teacher='self', checkpoint='{}/10.safetensors')
    vit = timm.create_model('test_vit', img_size=32, depth=2, num_classes=10).eval()
    vit.load_state_dict(load_file(files / '10.safetensors'))
    images = torch.randn(2, 3, 32, 32)
    taught = made[0](images, attention=True)
    torch.testing.assert_close(taught.logits, vit(images), rtol=1e-3, atol=1e-3)
    assert taught.grid == (2, 2)
    assert made[1] == (0.5, 1.0, 0.0, 0.0)


def test_a_new_classifier_teaches_tokens_in_place_of_logits(files: Path) -> None:
    made = distillation(files, teacher='self', checkpoint='{}/3.safetensors')
    assert made[1] == (0.0, 1.0, 1.0, 0.0)
    assert distillation(files, teacher='{}/3.safetensors', token_weight=0.3)[1] == (0.0, 1.0, 0.3, 0.0)


def test_a_checkpoint_and_a_folder_teach(files: Path) -> None:
    made = distillation(files, teacher='{}/10.safetensors', attention_weight=0.1, distill_temperature=2.0)
    assert made[1] == (0.5, 2.0, 0.0, 0.1)
    assert made[0](torch.randn(1, 3, 32, 32), attention=True).grid == (2, 2)
    settled, _ = resolve_settings({'pretrained': True, 'teacher': str(files / 'narrow')})
    narrow = distillation(files, teacher=settled.teacher)
    assert narrow[1] == (0.5, 1.0, 0.0, 0.0)
    assert narrow[0].shift.flatten().tolist() == pytest.approx([0.4 / 0.5, 0.3 / 0.5, 0.2 / 0.5])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'teacher': 'self'}, 'expected --pretrained or --checkpoint with --teacher self'),
        ({'teacher': 'vit_huge'}, "such as vit_.*, got 'vit_huge'"),
        ({'teacher': 'local-dir:{}/missing'}, 'cannot create the teacher local-dir:'),
        (
            {'teacher': '{}/3.safetensors', 'distill_weight': 0.5},
            "trained on the data's classes for --distill-weight 0.5",
        ),
        ({'teacher': 'local-dir:{}/narrow', 'token_weight': 1.0}, r'features of \[64\], got \[32\] of'),
        ({'teacher': '{}/10.safetensors', 'distill_weight': 0.0}, 'expected something to learn from the teacher'),
    ],
)
def test_rejects_teachers_that_cannot_teach(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(files, **options)


def test_rejects_attention_of_other_architectures(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convnet = timm.create_model('test_resnet', num_classes=10)
    create = timm.create_model
    monkeypatch.setattr(
        timm, 'create_model', lambda name, *a, **k: convnet if name == 'test_resnet' else create(name, *a, **k)
    )
    assert distillation(files, teacher='test_resnet')[1].logits == 0.5
    with pytest.raises(ValueError, match=r"one of timm's VisionTransformers .* got a ResNet"):
        distillation(files, teacher='test_resnet', attention_weight=1.0)
