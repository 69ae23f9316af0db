"""Training by Lightning's Trainer, and a run that goes on from its checkpoint."""

import pytest
import timm
import torch
from conftest import create
from hidden import EPOCHS, assert_finds, hidden_patterns, small_model
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy

import timm_apvit

lightning = pytest.importorskip('lightning', minversion='2.4')

# Lightning's own: of torch's trees, of few batches and of a loader without processes.
pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning:lightning'),
    pytest.mark.filterwarnings('ignore::FutureWarning:lightning'),
    pytest.mark.filterwarnings('ignore::UserWarning:lightning'),
]


class Classifier(lightning.LightningModule):
    """As the README has it."""

    def __init__(self, model=None):
        super().__init__()
        self.model = model or create(img_size=32, num_classes=3, num_patches=(1, 3))

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log('loss', loss)
        return loss

    def configure_optimizers(self):
        return create_optimizer_v2(self.model, opt='adamw', lr=1e-3, layer_decay=0.75)


def loader():
    labels = torch.arange(12) % 3
    noise = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(noise + labels[:, None, None, None] - 1.0, labels)
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(folder, classifier, epochs, checkpoint=None, batches=None):
    quiet = {'enable_progress_bar': False, 'enable_model_summary': False, 'logger': False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator='cpu', default_root_dir=folder, **quiet)
    trainer.fit(classifier, batches or loader(), ckpt_path=checkpoint)
    return trainer


def test_trainer_fits_and_its_checkpoint_goes_on_to_the_same_model(tmp_path):
    classifier = Classifier()
    images, labels = next(iter(loader()))
    untrained = cross_entropy(classifier.model(images), labels)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    trainer = fit(tmp_path, classifier, 2)
    trainer.save_checkpoint(tmp_path / 'two.ckpt')
    fit(tmp_path, classifier, 4, tmp_path / 'two.ckpt')
    assert cross_entropy(classifier.model.eval()(images), labels) < untrained

    unbroken = Classifier()
    unbroken.load_state_dict(start)
    fit(tmp_path, unbroken, 4)
    assert torch.equal(classifier.model(images), unbroken.model.eval()(images))

    timm_apvit.save_pretrained(classifier.model, tmp_path / 'ours')
    again = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True).eval()
    assert torch.equal(again(images), classifier.model(images))


def test_trainer_teaches_a_glance_where_to_look(tmp_path):
    images, labels, _ = hidden_patterns(512)
    data = torch.utils.data.TensorDataset(images, labels)
    classifier = Classifier(small_model())
    fit(tmp_path, classifier, EPOCHS, batches=torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
    assert_finds(classifier.model)
