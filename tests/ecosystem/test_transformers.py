"""What save_pretrained wrote is a checkpoint of transformers too, once timm_apvit is imported."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import assert_equal_up_to_rounding, create, images, learn, randomise, relative
from hidden import EPOCHS, assert_finds, hidden_patterns, small_model
from hub_server import client_environment, serve
from PIL import Image
from torch import nn

import timm_apvit
from timm_apvit import AdaptivePatching, interpolate_pos_embed

transformers = pytest.importorskip('transformers', minversion='4.57')

NAMES = ['owl', 'tit', 'emu']
MODEL_ARGS = {'num_patches': (3, 5), 'transform': 'affine', 'max_zoom': 3.0, 'max_shift': 0.5}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model that differs in every argument from what its name says, and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp('saved')
    torch.manual_seed(0)
    model = randomise(create(img_size=64, num_classes=3, **MODEL_ARGS))
    timm_apvit.save_pretrained(model, folder, label_names=NAMES)
    return model, str(folder)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def classifier(folder, **kwargs):
    return transformers.AutoModelForImageClassification.from_pretrained(folder, **kwargs).eval()


def test_auto_classes_give_the_model_with_every_argument(saved):
    model, folder = saved
    x = images(2, 3, 64, 64)
    loaded = classifier(folder)
    assert_equal_up_to_rounding(loaded(x).logits, model(x))
    assert loaded.timm_model.adaptive_args() == model.adaptive_args()
    assert loaded.config.id2label == dict(enumerate(NAMES))
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    outputs = backbone(x, output_hidden_states=True)
    assert_equal_up_to_rounding(backbone(x).last_hidden_state, model.forward_features(x))
    assert_equal_up_to_rounding(outputs.last_hidden_state, model.forward_features(x))
    assert_equal_up_to_rounding(model.head(outputs.pooler_output), model(x))
    assert [tuple(each.shape) for each in outputs.hidden_states] == [(2, 64, 4, 4)] * 6


def test_number_of_patches_may_change_and_images_have_any_size(saved):
    model, folder = saved
    loaded, twin = classifier(folder), timm.create_model(f'local-dir:{folder}', pretrained=True, num_patches=7).eval()
    loaded.timm_model.set_num_patches(7)
    x = images(1, 3, 80, 48)
    assert_equal_up_to_rounding(loaded(x).logits, twin(x))
    assert relative(loaded(x).logits - model(x), model(x)) > 0.01


def test_processor_and_pipeline_classify_as_timm_does(saved):
    model, folder = saved
    config = timm.data.resolve_model_data_config(model)
    config['input_size'] = (3, 64, 64)
    expected = timm.data.create_transform(**config)(picture())[None]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert_equal_up_to_rounding(processor(picture(), return_tensors='pt')['pixel_values'], expected)
    found = transformers.pipeline('image-classification', model=folder)(picture())
    probabilities = model(expected)[0].softmax(0)
    assert {each['label']: each['score'] for each in found} == pytest.approx(
        dict(zip(NAMES, probabilities.tolist(), strict=True)), rel=1e-3
    )


def test_pipeline_knows_of_classes_that_do_not_exclude_each_other(saved, tmp_path):
    model = copy.deepcopy(saved[0])
    kind = {'problem_type': 'multi_label_classification'}
    timm_apvit.save_pretrained(model, tmp_path / 'first', label_names=NAMES, model_config=kind)
    loaded = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True)
    timm_apvit.save_pretrained(loaded, tmp_path / 'second')  # which need not be told again
    timm_apvit.save_pretrained(model, tmp_path / 'again', label_names=NAMES)
    theirs = classifier(str(tmp_path / 'first'))
    theirs.save_pretrained(tmp_path / 'theirs')
    timm_apvit.save_pretrained(theirs.timm_model, tmp_path / 'theirs')
    for folder in ('first', 'second', 'again', 'theirs'):
        pipeline = transformers.pipeline('image-classification', model=str(tmp_path / folder))
        logits = pipeline.model(**pipeline.image_processor(picture(), return_tensors='pt')).logits[0]
        found = {each['label']: each['score'] for each in pipeline(picture())}
        assert found == pytest.approx(dict(zip(NAMES, logits.sigmoid().tolist(), strict=True)), rel=1e-3)
    loaded.reset_classifier(4)
    timm_apvit.save_pretrained(loaded, tmp_path / 'third')
    assert 'problem_type' not in json.loads((tmp_path / 'third/config.json').read_text())


def test_save_pretrained_and_back_is_the_same_model_to_both_libraries(saved, tmp_path):
    model, folder = saved
    x = images(2, 3, 64, 64)
    classifier(folder).save_pretrained(tmp_path)
    assert_equal_up_to_rounding(classifier(tmp_path)(x).logits, model(x))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert_equal_up_to_rounding(again(x), model(x))
    assert again.adaptive_args() == model.adaptive_args()


class Pictures(torch.utils.data.Dataset):
    """Images of 3 classes, each of a brightness of its own."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = images(index + 1, 3, 64, 64)[index] * 0.3 + index % 3 - 1
        return {'pixel_values': image, 'labels': index % 3}


def test_trainer_fine_tunes_and_its_checkpoint_comes_back(saved, tmp_path):
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    _, folder = saved
    model = classifier(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type='constant',
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy='epoch',
        save_total_limit=1,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Pictures(), eval_dataset=Pictures())
    untrained = trainer.evaluate()['eval_loss']
    trainer.train()
    assert trainer.evaluate()['eval_loss'] < 0.8 * untrained
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in before if 'localizer' in name} <= changed
    (checkpoint,) = tmp_path.glob('checkpoint-*')
    x = images(2, 3, 64, 64)
    assert_equal_up_to_rounding(classifier(checkpoint)(x).logits, model.eval()(x).logits)
    timm_apvit.save_pretrained(model.timm_model, tmp_path / 'ours', label_names=list(model.config.id2label.values()))
    assert_equal_up_to_rounding(classifier(tmp_path / 'ours')(x).logits, model(x).logits)


def test_trainer_teaches_a_glance_where_to_look(tmp_path):
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    timm_apvit.save_pretrained(small_model(), tmp_path / 'untrained', label_names=list('abcdef'))
    model = classifier(tmp_path / 'untrained')
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=32, learning_rate=1e-3,
        lr_scheduler_type='constant', report_to=[], disable_tqdm=True, use_cpu=True, save_strategy='no',
    )  # fmt: skip
    data = [{'pixel_values': image, 'labels': label} for image, label, _ in zip(*hidden_patterns(512), strict=True)]
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert_finds(model.timm_model)

    timm_apvit.save_pretrained(model.timm_model, tmp_path / 'ours')
    x = hidden_patterns(4, seed=2)[0]
    window = model.timm_model.patch_geometry(x).window
    for loaded in (
        transformers.AutoModel.from_pretrained(tmp_path / 'ours').eval(),
        classifier(tmp_path / 'ours', num_labels=4, ignore_mismatched_sizes=True),
    ):
        geometry = loaded.timm_model.patch_geometry(x)
        torch.testing.assert_close(geometry.window, window)
        assert geometry.logits.abs().max() < 1e-5


def test_other_classes_keep_the_rest_of_the_weights(saved):
    model, folder = saved
    loaded = classifier(folder, num_labels=5, ignore_mismatched_sizes=True)
    x = images(2, 3, 64, 64)
    assert loaded(x).logits.shape == (2, 5)
    assert_equal_up_to_rounding(loaded.timm_model.forward_features(x), model.forward_features(x))


FROM_HUB = """
import json, sys
import torch
import timm_apvit
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained('me/model').eval()
AutoImageProcessor.from_pretrained('me/model')
image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
print(json.dumps([model.timm_model.adaptive_args(), model(image).logits.tolist()]))
"""


def test_auto_classes_pull_from_the_hub(saved, tmp_path):
    model, folder = saved
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    with serve({'me/model': files}) as server:
        process = subprocess.run(
            [sys.executable, '-c', FROM_HUB],
            env=client_environment(server.endpoint, tmp_path),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert process.returncode == 0, process.stderr
    arguments, logits = json.loads(process.stdout)
    assert arguments == json.loads(json.dumps(model.adaptive_args()))
    torch.testing.assert_close(torch.tensor(logits), model(images(2, 3, 64, 64)))


def upernet(backbone):
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=3, hidden_size=32, auxiliary_in_channels=256, auxiliary_channels=16
    )
    return transformers.UperNetForSemanticSegmentation(config)


def dpt(backbone):
    sizes = {'neck_hidden_sizes': [16] * 4, 'fusion_hidden_size': 16, 'reassemble_factors': [1] * 4}
    config = transformers.DPTConfig(backbone_config=backbone, num_labels=3, is_hybrid=False, **sizes)
    return transformers.DPTForSemanticSegmentation(config)


def mask2former(backbone):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=3, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, num_queries=5, dim_feedforward=32, encoder_feedforward_dim=32,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


@pytest.mark.slow
@pytest.mark.parametrize('create_decoder', [upernet, dpt, mask2former])
def test_decoders_on_a_pyramid_learn_and_come_back(create_decoder, tmp_path):
    backbone = transformers.TimmBackboneConfig(backbone='pyramid.test_apvit', out_indices=[0, 1, 2, 3])
    model = create_decoder(backbone).train()
    x, labels = images(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 16:48, 16:48] = 1
    labels[:, 40:, :20] = 2
    x = x * 0.1 + labels.unsqueeze(1)
    masks = [torch.stack([(each == label).float() for label in range(3)]) for each in labels]
    targets = {'labels': labels}
    if create_decoder is mask2former:
        targets = {'mask_labels': masks, 'class_labels': [torch.arange(3)] * 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = learn(optimizer, 15, lambda: model(x, **targets).loss)
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    name = 'masks_queries_logits' if create_decoder is mask2former else 'logits'
    torch.testing.assert_close(getattr(again(x), name), getattr(model(x), name), rtol=0, atol=1e-5)


class AdaptiveEmbeddings(nn.Module):
    """In the place of the embeddings of transformers' ViT: its own weights, on adaptive patches."""

    def __init__(self, embeddings, grid_size):
        super().__init__()
        self.cls_token, self.position_embeddings = embeddings.cls_token, embeddings.position_embeddings
        self.patch_embeddings, self.grid_size = embeddings.patch_embeddings, grid_size
        self.patching = AdaptivePatching(embeddings.patch_embeddings.patch_size, num_patches=grid_size)

    def forward(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=None):
        patches, geometry = self.patching(pixel_values)  # (B, N, C, P, P)
        projection = self.patch_embeddings.projection
        tokens = patches.flatten(2) @ projection.weight.flatten(1).T + projection.bias
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + interpolate_pos_embed(self.position_embeddings, geometry.centres, self.grid_size, 1)


def test_pieces_make_transformers_own_vit_adaptive():
    size = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
    config = transformers.ViTConfig(image_size=(48, 64), patch_size=16, **size, attn_implementation='eager')
    model = randomise(transformers.ViTModel(config)).eval()
    x = images(2, 3, 48, 64)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        model.embeddings = AdaptiveEmbeddings(model.embeddings, (3, 4))
        assert_equal_up_to_rounding(model(x).last_hidden_state, expected)
        model.embeddings.patching.set_num_patches(5)
        assert model(x).last_hidden_state.shape == (2, 6, 32)
    model(x).last_hidden_state.square().sum().backward()
    assert model.embeddings.patching.localizer.fields['shift'].weight.grad.abs().sum() > 0
