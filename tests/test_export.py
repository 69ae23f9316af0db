"""Exported models give the logits of their models, and nothing that does not is left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import assert_equal_up_to_rounding, create, images, randomise, refused
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_apvit import export, save_pretrained
from timm_apvit.cli import export as command
from timm_apvit.cli.main import main
from timm_apvit.export import export_model

ONNX = ('onnx', 'onnxscript', 'onnxruntime')
# Loads a program with torch alone.
ALONE = """
import sys, torch
image, program = torch.load(sys.argv[1]), torch.export.load(sys.argv[2])
torch.save(program.module()(image), sys.argv[1])
assert not any('apvit' in name for name in sys.modules)
"""


def tiny(**kwargs: Any) -> Any:
    return create(**{'img_size': 32, 'num_patches': 4, 'depth': 1, 'num_classes': 5, **kwargs})


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('model')
    save_pretrained(tiny(), directory, label_names=list('abcde'))
    return directory


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def run_onnx(path: Path, image: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'image': image.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'opset'),
    [([], 20), pytest.param(['--opset', '18', '--img-size', '40x24'], 18, marks=pytest.mark.slow)],
)
def test_onnx_file_gives_the_logits_of_any_batch(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], opset: int
) -> None:
    onnx, *_ = [pytest.importorskip(name) for name in ONNX]
    path = tmp_path / 'x.onnx'
    assert main(['export', str(saved), '-o', str(path), '--num-patches', '3', *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f'{path}: images of {"40x24" if options else "32x32"} pixels, normalised by the mean (0.5'
    )
    assert lines[1].startswith('The largest difference from the logits of the model is ')
    assert 'on batches of 1, 2 and 5 images' in lines[1]
    assert left_in(tmp_path) == {'x.onnx'}

    written = onnx.load(path)
    facts = {each.key: json.loads(each.value) for each in written.metadata_props}
    assert facts['img_size'] == ([40, 24] if options else [32, 32])
    assert [facts['mean'], facts['label_names']] == [[0.5] * 3, list('abcde')]
    assert [(each.domain, each.version) for each in written.opset_import] == [('', opset)]
    ends = [*written.graph.input, *written.graph.output]
    assert [(end.name, end.type.tensor_type.shape.dim[0].dim_param) for end in ends] == [
        ('image', 'batch'), ('logits', 'batch'),
    ]  # fmt: skip
    model = timm.create_model(f'local-dir:{saved}', pretrained=True, num_patches=3).eval()
    for batch in (1, 3, 7):
        image = images(batch, 3, *((40, 24) if options else (32, 32)))
        torch.testing.assert_close(run_onnx(path, image), model(image), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('use_dynamo', [False, True])
def test_exporter_of_timm_gives_the_logits(tmp_path: Path, use_dynamo: bool) -> None:
    for name in ONNX:
        pytest.importorskip(name)
    from timm.utils import onnx

    model = randomise(tiny(num_patches=5, transform='similarity')).eval()
    onnx.onnx_export(
        model, str(tmp_path / 'x.onnx'), batch_size=2, input_size=(3, 32, 32), opset=18, use_dynamo=use_dynamo
    )
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(image)
    logits = torch.from_numpy(onnx.onnx_forward(str(tmp_path / 'x.onnx'), image))
    assert_equal_up_to_rounding(logits, expected)


@pytest.mark.slow
def test_program_gives_the_logits_without_this_package(saved: Path, tmp_path: Path) -> None:
    assert main(['export', str(saved), '-o', str(tmp_path / 'x.pt2')]) == 0
    image = images(3, 3, 32, 32)
    torch.save(image, tmp_path / 'image')
    arguments = [sys.executable, '-c', ALONE, str(tmp_path / 'image'), str(tmp_path / 'x.pt2')]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    torch.testing.assert_close(torch.load(tmp_path / 'image'), model(image), rtol=0, atol=1e-5)
    extra = {export.METADATA: ''}
    torch.export.load(tmp_path / 'x.pt2', extra_files=extra)
    assert json.loads(extra[export.METADATA])['label_names'] == list('abcde')


@pytest.mark.slow
@pytest.mark.parametrize(
    'kwargs',
    [{'transform': 'tps', 'localizer': 'glance', 'jitter': 0.5}, {'num_patches': None, 'num_classes': 0}],
    ids=str,
)
def test_every_kind_of_model_is_exported_as_it_is(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = tiny(**kwargs).train()
    model.set_grad_checkpointing()
    exported = export_model(model, tmp_path / 'x.pt2')
    assert exported.output == ('features' if 'num_classes' in kwargs else 'logits')
    assert exported.largest > 0.01
    assert model.training
    assert model.grad_checkpointing
    image = images(3, 3, 32, 32)
    found = torch.export.load(tmp_path / 'x.pt2').module()(image)
    assert_equal_up_to_rounding(found, model.eval()(image))


@pytest.mark.slow
def test_compiled_package_gives_the_logits(saved: Path, tmp_path: Path) -> None:
    if shutil.which('g++') is None:
        pytest.skip('AOTInductor compiles with g++')
    assert main(['export', str(saved), '-o', str(tmp_path / 'x.pt2'), '--format', 'aoti']) == 0
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    image = images(3, 3, 32, 32)
    found = torch._inductor.aoti_load_package(str(tmp_path / 'x.pt2'))(image)
    torch.testing.assert_close(found, model(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize('factor', [1.01, float('nan')])
def test_file_of_other_logits_is_not_left(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    monkeypatch.setattr(export, '_write', lambda _, path, *given: path.write_text('other'))
    monkeypatch.setattr(export, '_read', lambda *given: lambda image: factor * model(image))
    (tmp_path / 'x.pt2').write_text('before')
    assert main(['export', str(saved), '-o', str(tmp_path / 'x.pt2'), '--overwrite']) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        'error: expected the output of the model within 0.0001. The largest difference from the log'
    )
    assert error.endswith('; nothing was written\n')
    assert left_in(tmp_path) == {'x.pt2'}
    assert (tmp_path / 'x.pt2').read_text() == 'before'


def test_failed_export_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any, path: Path, *given: Any) -> None:
        path.write_text('half')
        raise KeyError('why\nand so on')

    monkeypatch.setattr(export, '_write', fails)
    assert main(['export', str(saved), '-o', str(tmp_path / 'x.pt2')]) == 1
    assert capsys.readouterr().err.startswith('error: cannot export to torch: ')
    assert left_in(tmp_path) == set()


def exports(*arguments: Any) -> int:
    return main(['export', *map(str, arguments)])


def test_rejects_bad_input(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'there.pt2').write_text('before')
    (tmp_path / 'folder.pt2').mkdir()
    good = tmp_path / 'x.pt2'
    before = left_in(tmp_path)
    for arguments, message in (
        ([saved, '-o', tmp_path / 'x.pth'], 'expected a file that ends in .onnx or .pt2, got '),
        ([saved, '-o', tmp_path / 'x'], 'expected a file that ends in .onnx or .pt2, got '),
        ([saved, '-o', good, '--format', 'onnx'], 'expected a file that ends in .onnx for the format onnx, got '),
        ([saved, '-o', good, '--format', 'x'], 'invalid choice'),
        ([saved, '-o', tmp_path / 'none/x.pt2'], 'expected a file in a folder that exists, got '),
        ([saved, '-o', tmp_path / 'folder.pt2'], 'expected a file in a folder that exists, got '),
        ([saved, '-o', '/proc/x.pt2'], "expected a file in a folder that can be written to, got '/proc/x.pt2': "),
        ([saved, '-o', tmp_path / 'there.pt2'], 'expected a file that does not exist yet, got '),
        ([saved], 'required: -o/--output'),
        ([tmp_path, '-o', good], 'which holds neither config.yaml nor config.json'),
        ([tmp_path / 'none', '-o', good], 'expected the folder of a run or of a saved model, got'),
        (['test_vit', '-o', good], "expected an APViT, got 'test_vit'"),
        (['test_apvit', '--checkpoint', tmp_path / 'none', '-o', good], 'expected a checkpoint file, got '),
        ([saved, '-o', good, '--num-patches', '1,4'], 'expected N or GHxGW'),
        ([saved, '-o', good, '--img-size', '2x'], "expected PIXELS or HxW, integers >= 1, got '2x'"),
        ([saved, '-o', good, '--opset', '17'], 'expected an integer >= 18'),
    ):
        assert message in refused(exports, arguments, capsys)
    assert left_in(tmp_path) == before
    assert (tmp_path / 'there.pt2').read_text() == 'before'


@pytest.mark.parametrize('module', ONNX)
def test_rejects_onnx_without_what_writes_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    for each in ONNX:
        monkeypatch.setitem(sys.modules, each, None if each == module else torch)
    error = refused(exports, [saved, '-o', tmp_path / 'x.onnx'], capsys)
    assert error == f"error: export to ONNX needs {module}: pip install 'timm-apvit[export]'\n"


def test_rejects_in_python(tmp_path: Path) -> None:
    for model, kwargs, error, message in (
        (nn.Linear(1, 1), {}, ValueError, 'expected an APViT, got Linear'),
        (tiny(), {'format': 'x'}, ValueError, "expected a format among onnx, torch, aoti, got 'x'"),
    ):
        with pytest.raises(error, match=message):
            export_model(model, tmp_path / 'x.pt2', **kwargs)  # type: ignore[arg-type]
    assert left_in(tmp_path) == set()
    (tmp_path / 'x.pt2').write_text('before')
    with pytest.raises(FileExistsError, match='expected a file that does not exist yet'):
        export_model(tiny(), tmp_path / 'x.pt2')
    assert (tmp_path / 'x.pt2').read_text() == 'before'


def test_options_reach_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    exported = export.Exported(tmp_path, 'torch', 'logits', (1, 1), 0, 0)
    monkeypatch.setattr(command, 'export_model', lambda *given, **named: calls.append((given, named)) or exported)
    model = create(num_classes=3)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    output = str(tmp_path / 'x.pt2')
    options = ['--format', 'aoti', '--img-size', '32', '--opset', '19', '--overwrite']
    weights = ['--checkpoint', str(tmp_path / 'weights.safetensors'), '--num-patches', '1x2']
    assert main(['export', 'test_apvit', '-o', output, *options, *weights]) == 0
    (((given, *rest), named),) = calls
    assert rest == [output, 'aoti']
    assert named == {'img_size': (32, 32), 'opset': 19, 'overwrite': True}
    model.set_num_patches((1, 2))
    image = images(3, 3, 32, 32)
    torch.testing.assert_close(given.eval()(image), model(image), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:.*torch.ao.quantization:DeprecationWarning', 'ignore::UserWarning:torch.ao')
@pytest.mark.parametrize('chosen', [{'blocks', 'head'}, {nn.Linear}], ids=['names', 'type'])
def test_blocks_in_int8_give_nearly_the_logits(chosen: Any) -> None:
    model = create(num_patches=9, num_classes=5)
    quantised = torch.ao.quantization.quantize_dynamic(model, chosen, dtype=torch.qint8)
    kinds = {name for name, module in quantised.named_modules() if type(module).__module__.startswith('torch.ao.nn')}
    assert {'blocks.0.attn.qkv', 'blocks.5.mlp.fc2', 'head'} <= kinds
    assert not any('patch_embed' in name for name in kinds)  # 8 bits would move patches
    image = images(16, 3, 160, 160)
    expected, found = model(image), quantised(image)
    assert 0 < (found - expected).std() < 0.05 * expected.std()
