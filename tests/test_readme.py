"""What the README, the documentation and the docstrings show runs."""

import doctest
import importlib.util
import inspect
import json
import pydoc
import re
import shlex
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import timm
from PIL import Image

import timm_apvit
from timm_apvit.cli.main import PROGRAM, make_parser
from timm_apvit.learning import distillation, parameter_groups, saliency
from timm_apvit.patching import layer, pos_embed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCKS = [
    (page.stem, block) for page in PAGES for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
]
SHOWN = re.compile(r'^ {4}.*?\b(?:python -m timm_apvit|timm-apvit) ((?:.*\\\n)*.*)', re.M)
COMMANDS = [command for page in PAGES for command in SHOWN.findall(page.read_text())]


# What goes to the Hub is run in cli/test_hub_readme.
@pytest.mark.filterwarnings('ignore:::lightning', 'ignore:::transformers')
@pytest.mark.parametrize(
    'block',
    [
        pytest.param(block, id=page, marks=pytest.mark.slow if 'export_model' in block else ())
        for page, block in BLOCKS
        if 'push_to_hub' not in block
    ],
)
def test_snippets_run(block, tmp_path, monkeypatch):
    """As they stand, but for the weights, which would come from the Hub."""
    for library in re.findall(r'^(?:import|from) (\w+)', block, re.M):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 30)).save('photo.jpg')
    names: dict[str, object] = {}
    code = block.replace("'apvit_small', pretrained=True", "'apvit_small'")
    exec(compile(code, 'snippet.py', 'exec'), names)
    if 'logits' in names:
        assert names['logits'].shape == (1 if 'create_model' in block else 2, 1000)
    if 'figure' in names:
        assert len(names['figure'].axes) == 4
    elif 'create_model' in block:
        assert names['model'].num_patches in {49, 64}  # of patches that crowd an even grid


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command.replace('\\\n', ''), comments=True)
    make_parser(PROGRAM).parse_args(words[: words.index('&&')] if '&&' in words else words)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
        assert '://' in target or (page.parent / target).exists(), target


@pytest.mark.parametrize('module', [layer, pos_embed, distillation, parameter_groups, saliency])
def test_docstring_examples_run(module, monkeypatch):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_help_of_every_public_name_and_its_methods_says_what_it_is():
    for name in set(timm_apvit.__all__) - {'__version__'}:
        public = getattr(timm_apvit, name)
        assert len(pydoc.plain(pydoc.render_doc(public)).splitlines()) > 3
        if not name.isupper():
            assert inspect.getdoc(public) not in (None, inspect.getdoc(object))
        methods = {key: each for key, each in vars(public).items() if key[0] != '_'} if inspect.isclass(public) else {}
        assert [key for key, each in methods.items() if inspect.isroutine(each) and not inspect.getdoc(each)] == []


def test_tables_are_those_of_the_results():
    results = ROOT / 'benchmarks/results'
    assert (results / 'photographs.md').read_text() in (ROOT / 'docs/results.md').read_text()
    measured = [json.loads(path.read_text()) for path in results.glob('photographs-*.json')]
    groups = defaultdict(list)
    for each in measured:
        groups[each['contestant'], each['budget'], each['label']].append(each)
    expected = {
        (
            f'{statistics.mean(each["curve"][0] for each in runs):.3f}',
            f'{statistics.mean(each["top1"] for each in runs):.3f}',
        )
        for runs in groups.values()
    }
    rows = re.findall(r'^\| .* \| [\d,]+ M \| ([\d.]+) \| \**([\d.]+)\**', (ROOT / 'README.md').read_text(), re.M)
    assert len(rows) >= 5
    assert set(rows) <= expected


def test_page_of_twins_is_that_of_the_registry():
    spec = importlib.util.spec_from_file_location('twins', Path(__file__).parents[1] / 'docs' / 'twins.py')
    twins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twins)
    written = twins.PAGE.read_text()
    if f'timm {timm.__version__}: ' not in written:
        pytest.skip(f'docs/twins.md is of another timm than {timm.__version__}: python docs/twins.py writes it anew')
    assert written == twins.page()
