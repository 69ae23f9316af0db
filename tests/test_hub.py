"""Models go to the Hub and come back as they were, and what goes wrong on the way leaves nothing half-done."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import create
from hub_server import create_models, serve
from hub_uploads import WritableHub, front_matter, run_client

import timm_apvit

pytestmark = pytest.mark.slow

FILES = {'model.safetensors', 'config.json', 'README.md'}
NAMES = ['bird', 'cat', 'dog', 'emu', 'fox', 'gnu', 'hen']
SHAPE = [2, 3, 96, 128]

# Pushes, in order, in one fresh process: what is pushed, where to, and how.
PUSH = """
import json, sys, time
import timm, timm_apvit

time.sleep = lambda seconds: None  # huggingface_hub waits between its retries
results = {}
for name, (source, repo_id, options) in json.loads(sys.argv[1]).items():
    if (card := options.pop('card', None)) is not None:
        options['card'] = timm_apvit.CardDetails(**card)
    try:
        if options.pop('as_folder', False):
            pushed = timm_apvit.push_to_hub(source, repo_id, **options)
        else:
            model = timm.create_model(f'local-dir:{source}', pretrained=True)
            pushed = timm_apvit.push_to_hub(model, repo_id, **options)
        results[name] = pushed._asdict()
    except Exception as error:
        results[name] = {'error': f'{type(error).__name__}: {error}'}
print(json.dumps(results))
"""


def changed_model(seed=0):
    """A model that differs in everything from what its name says."""
    torch.manual_seed(seed)
    model = create(transform='affine', num_patches=9, max_zoom=3.0, max_rotation=20.0, max_shift=0.7, max_shear=0.2)
    model.reset_classifier(7)
    model.set_input_size((96, 128))
    model.set_num_patches((3, 5))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def push(server, home, pushes, **environment):
    """Push from a fresh process; ``{name: Pushed as a dictionary, or {"error"}}``."""
    process = run_client(server, home, PUSH, json.dumps(pushes), **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def logits(model, shape=SHAPE):
    with torch.no_grad():
        return model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Models and the folders that they are saved in."""
    folder = tmp_path_factory.mktemp('saved')
    models = {name: changed_model(seed) for seed, name in enumerate(('first', 'second', 'third', 'fourth', 'fifth'))}
    for name, model in models.items():
        timm_apvit.save_pretrained(model, folder / name, label_names=NAMES)
    (folder / 'picture.png').write_bytes(b'\x89PNG')
    oids = {name: hashlib.sha256((folder / name / 'model.safetensors').read_bytes()).hexdigest() for name in models}
    return SimpleNamespace(models=models, folder=folder, oids=oids)


@pytest.fixture(scope='module')
def hub(saved, tmp_path_factory):
    """A Hub that many pushes went to, what became of them, and what comes back."""
    home = tmp_path_factory.mktemp('home')
    first, second, third, fourth, fifth = (str(saved.folder / name) for name in saved.models)
    card = {'license': 'mit', 'base_model': 'timm/test_vit.r160_in1k', 'picture': str(saved.folder / 'picture.png')}
    pushes = {
        'new': (first, 'me/model', {'commit_message': 'Say hello'}),
        'existing': (second, 'me/model', {}),
        'own card': (second, 'me/written', {}),
        'overwritten': (second, 'me/written', {'overwrite_card': True, 'card': card}),
        'branch': (third, 'me/model', {'revision': 'v2'}),
        'pull request': (third, 'me/model', {'create_pr': True}),
        'to the request': (fourth, 'me/model', {'revision': 'refs/pr/1', 'overwrite_card': True}),
        'of another': (third, 'you/model', {'create_pr': True}),
        'private': (first, 'me/secret', {'private': True}),
        'again private': (second, 'me/secret', {'private': True}),
        'public': (first, 'me/model', {'private': True}),
        'short name': (first, 'short', {'as_folder': True}),
        'renamed': (first, 'me/renamed', {'label_names': [name.upper() for name in NAMES]}),
        'refused card': (first, 'me/refused', {'card': {'license': 'my own'}}),
        'refused base': (first, 'refused', {'card': {'base_model': 'not a repo!!'}, 'as_folder': True}),
        'empty token': (first, 'me/tokenless', {'token': ''}),
        'no right': (first, 'you/other', {}),
        'wrong token': (first, 'me/wrong', {'token': 'hf_wrong'}),
        'no creation': (first, 'me/failing-creation', {}),
        'no commit': (first, 'me/failing-commit', {}),
        'recovers': (first, 'me/recovering', {}),
        'hangs up once': (fourth, 'me/dropped', {'as_folder': True}),
        'hangs up': (fifth, 'me/lost', {'as_folder': True}),
    }
    with serve({'me/written': {'README.md': b'My own words.'}, 'you/model': {}}, WritableHub) as server:
        server.tokens = {'hf_mine': ('me', 'write'), 'hf_yours': ('you', 'write')}
        server.faults = {
            'POST /api/models/me/failing-commit/commit/main': [500],
            'POST /api/models/me/recovering/preupload/main': [500, 503],
            'POST /api/repos/create failing-creation': [500],
            f'PUT /lfs/{saved.oids["fourth"]}': ['drop'],
            f'PUT /lfs/{saved.oids["fifth"]}': ['drop'] * 9,
        }
        results = push(server, home / 'push', pushes, HF_TOKEN='hf_mine')
        commits = {name: result['oid'] for name, result in results.items() if 'oid' in result}
        server.truncate_once.add('me/renamed/model.safetensors')
        calls = {
            'cut': 'me/renamed',
            'main': 'me/model',
            'renamed': 'me/renamed',
            'first commit': f'me/model@{commits["new"]}',
            'branch': 'me/model@v2',
            'pull request': 'me/model@refs/pr/1',
            'private': 'me/secret',
            'unknown': 'me/model@v3',
            'lost': 'me/lost',
            'dropped': 'me/dropped',
        }
        pulled = create_models(
            server,
            home / 'pull',
            {name: (f'hf-hub:{each}', {}, SHAPE) for name, each in calls.items()},
            HF_TOKEN='hf_mine',
        )
        stranger = create_models(server, home / 'stranger', {'private': ('hf-hub:me/secret', {}, SHAPE)})
        yield SimpleNamespace(server=server, results=results, pulled=pulled, stranger=stranger, home=home)


COMES_BACK = {
    'main': 'second',
    'renamed': 'first',
    'first commit': 'first',
    'branch': 'third',
    'pull request': 'fourth',
    'private': 'second',
    'dropped': 'fourth',
}


@pytest.mark.parametrize('call', COMES_BACK)
def test_pulled_model_is_the_pushed_one_to_the_last_bit(call, hub, saved):
    model = saved.models[COMES_BACK[call]]
    pulled = hub.pulled[call]
    assert 'error' not in pulled, pulled
    assert torch.equal(pulled['logits'], logits(model))
    assert pulled['args'] == model.adaptive_args()
    assert pulled['args']['num_patches'] == (3, 5)
    assert pulled['label_names'] == ([name.upper() for name in NAMES] if call == 'renamed' else NAMES)


def test_upload_is_safetensors_and_text_alone_in_one_commit(hub):
    assert set(hub.server.repositories['me/model']) == FILES | {'.gitattributes'}
    assert hub.server.requests.count('POST /api/models/me/renamed/commit/main') == 1
    assert hub.server.messages[:2] == ['Say hello', 'Upload test_apvit, 15 patches']
    config = json.loads(hub.server.repositories['me/model']['config.json'])
    assert 'num_classes' not in config['model_args']


def test_results_say_where_it_went(hub):
    new, request = hub.results['new'], hub.results['pull request']
    assert new['repo_id'] == 'me/model'
    assert new['commit_url'] == f'{hub.server.endpoint}/me/model/commit/{new["oid"]}'
    assert new['pr_url'] is None
    assert request['pr_url'] == f'{hub.server.endpoint}/me/model/discussions/1'
    assert hub.results['of another']['pr_url'] == f'{hub.server.endpoint}/you/model/discussions/1'
    assert hub.server.repositories['you/model'] == {}
    assert hub.results['short name']['repo_id'] == 'me/short'


def test_readme_that_exists_is_kept_unless_asked(hub):
    assert hub.results['new']['wrote_card']
    assert not hub.results['existing']['wrote_card']
    assert not hub.results['own card']['wrote_card']
    own, after = (hub.server.commits['me/written'][hub.results[name]['oid']] for name in ('own card', 'overwritten'))
    assert own['README.md'] == b'My own words.'
    assert 'patches.png' not in own
    assert front_matter(after['README.md'].decode())['license'] == 'mit'
    assert after['patches.png'] == b'\x89PNG'
    assert after['model.safetensors'] == own['model.safetensors']


def test_card_of_a_pull_request_tells_how_to_pull_what_it_is_merged_into(hub):
    card = hub.server.branches['me/model']['refs/pr/1']['README.md'].decode()
    assert "'hf-hub:me/model'" in card
    assert 'refs/pr' not in card


def test_card_tells_how_to_pull_the_branch(hub):
    at_branch = hub.server.branches['me/model']['v2']
    # The branch began with the card of main, which is kept.
    assert "'hf-hub:me/model'" in at_branch['README.md'].decode()
    assert 'hf-hub:me/model@new' in timm_apvit.hub.card.model_card(create(), 'me/model', revision='new')


def test_private_repository_is_private_and_a_public_one_is_refused(hub):
    assert hub.server.private == {'me/secret'}
    assert 'me/secret' in hub.stranger['private']['error']
    assert hub.results['public']['error'].startswith('ValueError: expected a repository that is new or private')


def test_rejects_pushes_by_what_failed(hub):
    errors = {name: result['error'] for name, result in hub.results.items() if 'error' in result}
    assert errors.keys() == {
        'public', 'refused card', 'refused base', 'no right', 'wrong token', 'no creation', 'no commit', 'hangs up',
    }  # fmt: skip
    assert '"license" is not valid' in errors['refused card']
    assert '"base_model" is not valid' in errors['refused base']
    for name in ('refused card', 'refused base'):
        assert errors[name].startswith('ValueError: expected a model card that the Hub takes, got one of which it says')
    assert errors['wrong token'].startswith('PermissionError: expected a token that lets us write to me/wrong')
    assert 'hf auth login or set HF_TOKEN' in errors['wrong token']
    assert errors['no right'] == ("PermissionError: expected a repository of me, whose token it is, got 'you/other'")
    for name in ('no creation', 'no commit'):
        assert errors[name].startswith(f'ConnectionError: the Hub did not take me/failing-{name[3:]}')
        assert '500' in errors[name]
        assert 'on demand' in errors[name]
    assert errors['hangs up'].startswith('ConnectionError: cannot reach the Hub for me/lost: ')
    assert 'hf_wrong' not in str(errors)


def test_failed_push_leaves_no_half_model_on_the_hub(hub):
    assert 'me/failing-creation' not in hub.server.repositories
    assert not {'me/refused', 'you/other'} & hub.server.repositories.keys()
    for name in ('me/failing-commit', 'me/lost'):
        assert set(hub.server.repositories[name]) == {'.gitattributes'}


def test_uploads_are_repeated_where_huggingface_hub_repeats_them(hub, saved):
    requests = hub.server.requests
    assert requests.count('POST /api/models/me/recovering/preupload/main') == 3
    assert requests.count(f'PUT /lfs/{saved.oids["fourth"]}') == 2
    assert requests.count(f'PUT /lfs/{saved.oids["fifth"]}') == 6
    assert set(hub.server.repositories['me/recovering']) == FILES | {'.gitattributes'}
    uploaded = hub.server.repositories['me/dropped']['model.safetensors']
    assert uploaded == (saved.folder / 'fourth/model.safetensors').read_bytes()


def test_rejects_downloads_that_fail_by_what_failed(hub):
    errors = {name: result['error'] for name, result in hub.pulled.items() if 'error' in result}
    assert errors.keys() == {'cut', 'unknown', 'lost'}
    assert 'Consistency check failed' in errors['cut']
    assert 'v3' in errors['unknown']
    assert 'me/lost' in errors['lost']


def test_interrupted_download_leaves_no_half_written_checkpoint(saved, tmp_path):
    files = {path.name: path.read_bytes() for path in (saved.folder / 'first').iterdir()}
    with serve({'me/model': files}, WritableHub) as server:
        server.truncate_once.add('me/model/model.safetensors')
        call = {'model': ('hf-hub:me/model', {}, SHAPE)}
        assert 'error' in create_models(server, tmp_path, call)['model']
        assert not list(tmp_path.rglob('model.safetensors'))
        assert torch.equal(create_models(server, tmp_path, call)['model']['logits'], logits(saved.models['first']))
        whole = [path.read_bytes() for path in tmp_path.rglob('model.safetensors')]
        assert whole == [files['model.safetensors']]
