"""The push command and --push-to-hub: what goes to the Hub, what the card says, and what a failure leaves."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import create
from hub_server import create_models, serve
from hub_uploads import WritableHub, front_matter, run_client
from images import write_images
from PIL import Image

from timm_apvit.cli.push import card_of
from timm_apvit.hub.saving import save_pretrained

pytestmark = pytest.mark.slow

TINY = '--model test_apvit --img-size 32 --num-patches 2,4 --samples 32 --test-samples 24 --batch-size 16 --epochs 1'
TINY += ' --model-kwargs depth=2 --threads 1 --device cpu --twin --seed 3'
PUSHED = {'model.safetensors', 'config.json', 'README.md', 'patches.png', '.gitattributes'}

# Commands, in order, in one fresh process: their exit status and what they print.
COMMANDS = """
import contextlib, io, json, os, sys, time
from timm_apvit.cli.main import main

time.sleep = lambda seconds: None  # huggingface_hub waits between its retries
results = {}
for name, (command, environment) in json.loads(sys.argv[1]).items():
    os.environ.pop('HF_TOKEN', None)
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
    results[name] = {'status': status, 'out': out.getvalue(), 'err': err.getvalue()}
print(json.dumps(results))
"""


def command(server: WritableHub, home: Path, commands: dict[str, Any]) -> dict[str, SimpleNamespace]:
    process = run_client(server, home, COMMANDS, json.dumps(commands))
    assert process.returncode == 0, process.stderr
    return {name: SimpleNamespace(**result) for name, result in json.loads(process.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope='module')
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Hub, the commands that talked to it, and the folders that they left."""
    folder = tmp_path_factory.mktemp('push')
    model = create(img_size=32, num_classes=2, num_patches=3)
    save_pretrained(model, folder / 'saved', label_names=['cat', 'dog'])
    for n, name in enumerate(('train/cat', 'train/dog', 'val/cat', 'val/dog')):
        write_images(folder / 'my secret animals' / name, 8, seed=n)
    mine, images = {'HF_TOKEN': 'hf_mine'}, str(folder / 'my secret animals')
    checkpoint = str(folder / 'saved/model.safetensors')

    def run(name: str, *more: str) -> list[str]:
        return ['finetune', *TINY.split(), '--output', str(folder / name), *more]

    on_images = f'--model test_apvit --checkpoint {checkpoint} --img-size 32 --num-patches 3 --batch-size 8 --epochs 1'
    on_images += f' --threads 1 --workers 0 --device cpu --output {folder / "images"}'
    commands: dict[str, Any] = {
        'digits': (run('digits', '--push-to-hub', 'me/digits'), mine),
        'malformed': (run('none', '--push-to-hub', 'a/b/c'), mine),
        'no token': (run('none', '--push-to-hub', 'me/digits'), {}),
        'wrong token': (run('none', '--push-to-hub', 'me/digits'), {'HF_TOKEN': 'hf_wrong'}),
        'read token': (run('none', '--push-to-hub', 'me/digits'), {'HF_TOKEN': 'hf_read'}),
        'of another': (run('none', '--push-to-hub', 'you/digits'), mine),
        'private alone': (run('none', '--private'), mine),
        'no picture alone': (run('none', '--no-push-picture'), mine),
        'fails': (
            ['finetune', images, *on_images.split(), '--push-to-hub', 'me/animals', '--private',
             '--no-push-picture'], mine
        ),
        'evaluate': (
            ['evaluate', str(folder / 'digits'), '--num-patches', '2,4', '--batch-size', '8', '--device', 'cpu',
             '--json', str(folder / 'digits/evaluation.json')], mine,
        ),
        'evaluated': (
            ['push', str(folder / 'digits'), 'me/digits', '--overwrite-card', '--no-picture', '--license', 'mit',
             '--dataset', 'me/numbers', '--base-model', 'timm/test_vit.r160_in1k'], mine,
        ),
        'kept': (['push', str(folder / 'digits'), 'me/digits'], mine),
        'saved': (['push', str(folder / 'saved'), 'me/saved', '--token', 'hf_mine', '--revision', 'v2'], {}),
        'request': (['push', str(folder / 'saved'), 'me/saved', '--create-pr', '--commit-message', 'Look'], mine),
        'strangers': (['push', str(folder / 'saved'), 'me/strange'], {}),
        'refused': (['push', str(folder / 'saved'), 'you/saved'], mine),
        'offline': (run('none', '--push-to-hub', 'me/digits'), mine),
    }  # fmt: skip
    offline = commands.pop('offline')
    with serve({'me/empty': {}}, WritableHub) as server:
        server.tokens = {'hf_mine': ('me', 'write'), 'hf_read': ('me', 'read')}
        server.faults = {'POST /api/models/me/animals/commit/main': [500]}
        results = command(server, folder / 'home', commands)
        yield SimpleNamespace(server=server, results=results, folder=folder, model=model, offline=offline)


def readme(hub: SimpleNamespace, name: str, revision: str = 'main') -> str:
    found = hub.server.at(name, revision)
    assert found is not None
    return str(found[1]['README.md'].decode())


def first_card(hub: SimpleNamespace) -> str:
    """The card of the digits before it was overwritten."""
    texts = [files.get('README.md', b'').decode() for files in hub.server.commits['me/digits'].values()]
    return next(text for text in texts if 'best epoch' in text)


def test_run_is_pushed_when_it_is_done(hub: SimpleNamespace) -> None:
    result = hub.results['digits']
    assert (result.status, result.err) == (0, '')
    assert f'pushed      {hub.server.endpoint}/me/digits/commit/' in result.out
    files = hub.server.commits['me/digits'][result.out.rpartition('/me/digits/commit/')[2].split()[0]]
    assert set(files) == PUSHED
    assert files['model.safetensors'] == (hub.folder / 'digits/best/model.safetensors').read_bytes()
    assert files['patches.png'] == (hub.folder / 'digits/patches.png').read_bytes()
    summary = json.loads((hub.folder / 'digits/summary.json').read_text())
    card = first_card(hub)
    for budget in ('2', '4'):
        assert f'| {budget} | {summary["test_apvit"]["budgets"][budget]["best_top1"]:.3f} |' in card
    assert f'on a fixed grid of 4 patches, trained alike, reached {summary["fixed grid"]["best_top1"]:.3f}' in card
    assert '![' in card
    assert front_matter(card)['model-index'][0]['results'][0]['dataset']['type'] == 'digits'
    assert 'base_model' not in front_matter(card)


def test_pushed_run_comes_back_in_a_fresh_process_as_its_card_shows(hub: SimpleNamespace, tmp_path: Path) -> None:
    Image.new('RGB', (40, 50), 'red').save(tmp_path / 'image.jpg')
    code = re.search(r'```python\n(.*?)```', readme(hub, 'me/digits'), re.DOTALL)
    assert code is not None
    script = f'import os, timm_apvit\nos.chdir({str(tmp_path)!r})\n{code[1]}'
    script += f'torch.save(model.state_dict(), {str(tmp_path / "weights.pt")!r})\n'
    process = run_client(hub.server, tmp_path / 'home', script)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in list('0123456789')
    best = timm.create_model(f'local-dir:{hub.folder / "digits/best"}', pretrained=True).state_dict()
    pulled = torch.load(tmp_path / 'weights.pt')
    assert pulled.keys() == best.keys()
    assert all(torch.equal(pulled[key], best[key]) for key in best)


def test_rejects_before_training_what_cannot_be_pushed(hub: SimpleNamespace) -> None:
    expected = {
        'malformed': "expected a repository as NAMESPACE/NAME, got 'a/b/c'",
        'no token': 'expected a token that lets us write to me/digits on the Hub, got none',
        'wrong token': 'got one that it refuses: Invalid user token.',
        'read token': 'got one that may only read',
        'of another': "expected a repository of me, whose token it is, got 'you/digits'",
        'private alone': 'expected --push-to-hub with --private, got none',
    }
    for name, message in expected.items():
        assert hub.results[name].status == 2
        assert hub.results[name].err.startswith('error: ')
        assert message in hub.results[name].err
        assert hub.results[name].err.count('\n') == 1
        assert hub.results[name].out == ''
    assert not (hub.folder / 'none').exists()


def test_rejects_before_training_when_the_hub_is_out_of_reach(hub: SimpleNamespace, tmp_path: Path) -> None:
    with serve({}, WritableHub) as server:
        pass
    result = command(server, tmp_path, {'offline': hub.offline})['offline']
    assert result.status == 2
    assert result.err.startswith('error: cannot reach the Hub for me/digits: ')
    assert not (hub.folder / 'none').exists()


def test_failed_push_leaves_the_run_whole_and_says_how_to_push_it(hub: SimpleNamespace, tmp_path: Path) -> None:
    result = hub.results['fails']
    assert result.status == 1
    assert result.err.startswith('error: the Hub did not take me/animals: ')
    assert f'the run is whole in {hub.folder / "images"}; push it again with\n' in result.err
    for name in ('best/model.safetensors', 'summary.json', 'patches.png', 'config.yaml'):
        assert (hub.folder / 'images' / name).is_file()
    words = shlex.split(result.err.splitlines()[-1])
    assert words[:3] == ['python', '-m', 'timm_apvit']
    again = command(hub.server, tmp_path / 'home', {'again': (words[3:], {'HF_TOKEN': 'hf_mine'})})['again']
    assert (again.status, again.err) == (0, '')
    assert set(hub.server.repositories['me/animals']) == PUSHED - {'patches.png'}  # as was asked for
    assert 'me/animals' in hub.server.private


def test_card_of_a_run_tells_no_path_of_the_machine(hub: SimpleNamespace) -> None:
    card = card_of(hub.folder / 'images', {})
    assert card.training is not None
    assert str(hub.folder) not in str(card.training)
    shown = yaml.safe_load(card.training)
    assert shown['data'] == 'my secret animals'
    assert shown['checkpoint'] == 'model.safetensors'
    assert not shown.keys() & {'push_to_hub', 'private', 'output'}
    assert card.results_dataset == ('imagefolder', 'my secret animals')
    assert str(hub.folder) not in readme(hub, 'me/digits')


def test_evaluation_makes_the_table(hub: SimpleNamespace) -> None:
    assert hub.results['evaluated'].status == 0, hub.results['evaluated'].err
    report = json.loads((hub.folder / 'digits/evaluation.json').read_text())
    card = readme(hub, 'me/digits')
    assert '| patches | top-1 | top-5 | loss | M multiply-adds | images/s alone | images/s in batches of 8 |' in card
    for row in report['rows']:
        assert f'| {row["budget"]} | {row["top1"]:.3f} | {row["top5"]:.3f} | {row["loss"]:.3f} |' in card
    data = front_matter(card)
    assert (data['license'], data['datasets']) == ('mit', ['me/numbers'])
    assert data['base_model'] == 'timm/test_vit.r160_in1k'
    assert 'patches.png' not in card
    assert set(hub.server.repositories['me/digits']) == PUSHED - {'patches.png'}  # which was there before


def test_card_that_exists_is_kept(hub: SimpleNamespace) -> None:
    assert hub.results['kept'].status == 0
    assert 'kept the README.md that is there; --overwrite-card replaces it' in hub.results['kept'].out


def test_saved_model_is_pushed_to_branch_and_pull_request(hub: SimpleNamespace, tmp_path: Path) -> None:
    assert (hub.results['saved'].status, hub.results['saved'].err) == (0, '')
    assert 'hf-hub:me/saved@v2' in readme(hub, 'me/saved', 'v2')
    assert set(hub.server.repositories['me/saved']) == {'.gitattributes'}
    assert f'pushed      {hub.server.endpoint}/me/saved/discussions/1' in hub.results['request'].out
    assert 'hf-hub:me/saved@' not in readme(hub, 'me/saved', 'refs/pr/1')
    assert 'Look' in hub.server.messages
    calls = {'branch': ('hf-hub:me/saved@v2', {}, [2, 3, 32, 32])}
    pulled = create_models(hub.server, tmp_path, calls)['branch']
    images = torch.randn([2, 3, 32, 32], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(pulled['logits'], hub.model(images))
    assert pulled['label_names'] == ['cat', 'dog']


def test_refused_push_says_so_in_a_line(hub: SimpleNamespace) -> None:
    assert hub.results['refused'].status == 1
    assert hub.results['refused'].err == "error: expected a repository of me, whose token it is, got 'you/saved'\n"
    assert 'on the Hub, got none; log in with hf auth login' in hub.results['strangers'].err
