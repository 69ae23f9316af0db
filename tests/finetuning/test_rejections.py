"""What the command refuses before any work, in a line that says what it expected."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from timm_apvit.cli.main import main


def write_images(folder: Path, number: int = 4) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(number):
        Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(folder / f'{n}.png')


@pytest.fixture
def unsound(tmp_path: Path) -> Path:
    """Inputs of which each has something wrong with it."""
    for name in ('one/train/cat', 'one/val/cat', 'broken/train/cat', 'broken/train/dog', 'broken/val/cat'):
        write_images(tmp_path / name, 2)
    (tmp_path / 'broken/train/dog/1.png').write_bytes(b'no image')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/precious').write_text('precious')
    (tmp_path / 'junk.safetensors').write_bytes(b'junk')
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    vit = timm.create_model('test_vit', img_size=32)
    save_file({k: v for k, v in vit.state_dict().items() if 'blocks.2' not in k}, tmp_path / 'partial.safetensors')
    return tmp_path


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('{}/missing', 'missing'),
        ('{}/empty', 'got nothing'),
        ('{}/one', "got those of 'cat' only"),
        ('{}/broken --model test_apvit', 'dog/1.png'),
        ('--model apvit_smal', "such as apvit_small, apvit_base, apvit_large, apvit_flexivit_small, got 'apvit_smal'"),
        ('--model apvit_beit_base_patch16_224', 'a bias for each pair of cells of a fixed grid; take the twin of'),
        ('--model test_vit', "expected an APViT, got 'test_vit'"),
        ('--model local-dir:{}/empty', 'cannot create local-dir:'),
        ('--num-patches 0', "integers >= 1, got '0'"),
        ('--num-patches 4x0', "got '4x0'"),
        ('--num-patches -3', 'num-patches'),
        ('--num-patches 2.5', "got '2.5'"),
        ('--transform wild', 'translation, scale'),
        ('--model-kwargs max_zoom=0.5', 'max_zoom'),
        ('--model-kwargs unknown=1', 'unknown'),
        ('--model-kwargs novalue', "expected key=value, got 'novalue'"),
        ('--epochs 0', "an integer >= 1, got '0'"),
        ('--lr nan', "a number above 0, got 'nan'"),
        ('--layer-decay 1.5', '<= 1'),
        ('--epochs 2 --warmup 2', 'expected --warmup below --epochs, got 2 of 2'),
        ('--device toaster', "got 'toaster'"),
        ('--checkpoint {}/missing.pth', 'missing.pth'),
        ('--checkpoint {}/junk.safetensors', 'junk.safetensors'),
        ('--checkpoint {}/junk.pth', 'junk.pth'),
        ('--model test_apvit --checkpoint {}/partial.safetensors', 'blocks.2.'),
        ('--output {}/taken', 'taken'),
        ('--resume {}/taken', 'expected the folder of a run'),
        ('--model-kwargs num_classes=7', 'expected the number of classes of the data, got num_classes among'),
        ('--num-patches 1000000000', 'expected --num-patches of at most the 12544 pixels of an image, got 1000000000'),
        ('--tensorboard', '--tensorboard was removed: --log-with tensorboard'),
        ('--log-with paper', "expected --log-with .*tensorboard.*, got 'paper'"),
        ('--monitor luck', "expected test_top1, test_map or test_loss, got 'luck'"),
        ('--mean 0.5', 'expected --mean with --std, got one of them'),
        ('--mean 1 2 --std 1 2', 'expected --mean of 1 channels, got 2 values'),
        ('--class-weights balanced', 'expected images that have one label each, and say which, with --class-weights'),
        ('--class-weights balanced --balanced-sampling', 'balanced or --balanced-sampling, got both'),
        ('--opt adamv', "of one of the optimisers of timm, such as .*adam.*, got 'adamv'"),
        ('--sched never', "expected cosine, poly or tanh, got 'never'"),
        ('--resume {}/taken --output {}/new', 'expected --output or --resume, got both'),
        ('--colour red', '--colour'),
        ('--max-focus 5', '--max-focus was removed: --localizer glance finds the window by itself'),
        ('--guide-weight=1', '--guide-weight was removed'),
        ('--num-patches 16,25 --model-kwargs localizer="saliency"', 'got 25 in 5 rows'),
        ('--num-patches 4,2x2', "numbers of patches that all differ, got '4,2x2'"),
        ('--pretrained --checkpoint {}/junk.pth', 'expected --pretrained or --checkpoint, got both'),
        ('{}/one --samples 5', 'got --samples with DATA'),
        ('--num-patches 4 --model-kwargs num_patches=9', 'expected --num-patches or num_patches among --model-kwargs'),
        ('--jitter-epochs 2', 'expected a --jitter above 0 for --jitter-epochs to lower, got none'),
        ('--jitter 0.1 --jitter-epochs 9', 'expected --jitter-epochs of at most --epochs, got 9 of 5'),
        ('--freeze-backbone-epochs 7', 'expected --freeze-backbone-epochs of at most --epochs, got 7 of 5'),
        ('--token-weight 1', 'expected --teacher with --token-weight, got none'),
        ('--glance-epochs 5 --localizer cnn', 'expected --localizer glance with --glance-epochs, got cnn'),
        ('--mixup-prob 0.5', 'expected --mixup or --cutmix with --mixup-prob, got neither'),
        ('--ema 1', "a number above 0 and below 1, got '1'"),
        ('--smoothing 1', "a number >= 0 and below 1, got '1'"),
        ('--amp float16', "expected --amp bfloat16 on 'cpu', got float16, which needs a CUDA GPU"),
        ('--batch-size 10 --grad-accum 4', 'that divides by 4: 1 processes x 4 of --grad-accum, got 10'),
        ('--batch-size 6 --grad-accum 2 --mixup 1', 'in pairs for --mixup and --cutmix, got 6'),
        ('--samples 9 --mixup 1', 'got 9 (there are 9 training images)'),
        ('--teacher self', 'expected --pretrained or --checkpoint with --teacher self, got an untrained model'),
        ('--teacher vit_huge', "got 'vit_huge'"),
    ],
)
@pytest.mark.filterwarnings('ignore:Mapping deprecated model name')
def test_rejects_bad_input_before_any_work(
    arguments: str, message: str, unsound: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unsound)
    before = {path: path.read_bytes() for path in unsound.rglob('*') if path.is_file()}
    try:
        status = main(['finetune', '--device', 'cpu', *arguments.replace('{}', str(unsound)).split()])
    except SystemExit as error:
        status = int(str(error.code))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith('error: ')
    assert captured.err.count('\n') == 1
    assert re.search(message, captured.err) if '.*' in message else message in captured.err
    assert captured.out == ''
    assert {path: path.read_bytes() for path in unsound.rglob('*') if path.is_file()} == before


@pytest.mark.parametrize('command', [['finetune'], ['evaluate', 'test_apvit']])
def test_rejects_data_of_an_empty_name_which_would_be_the_current_folder(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, ''])
    assert "argument DATA: expected a string that is not empty, got ''" in capsys.readouterr().err
