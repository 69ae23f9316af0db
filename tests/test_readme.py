"""What the README and the docstrings show runs."""

import doctest
import importlib.util
import inspect
import pydoc
import re
import shlex
from pathlib import Path

import pytest
import timm
from PIL import Image

import timm_apvit
from timm_apvit.__main__ import PROGRAM, make_parser
from timm_apvit.patching import layer, pos_embed

README = Path(__file__).parents[1] / 'README.md'


BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
COMMANDS = re.findall(r'^ {4}.*?\bpython -m timm_apvit ((?:.*\\\n)*.*)', README.read_text(), re.M)


# What goes to the Hub is run in finetuning/test_hub_readme.
@pytest.mark.filterwarnings('ignore:::lightning')
@pytest.mark.parametrize('block', [block for block in BLOCKS if 'push_to_hub' not in block], ids=range(9))
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
        assert names['model'].num_patches == 49


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command.replace('\\\n', ''), comments=True)
    make_parser(PROGRAM).parse_args(words[: words.index('&&')] if '&&' in words else words)


@pytest.mark.parametrize('module', [layer, pos_embed])
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


def test_table_is_that_of_the_results():
    table = (Path(__file__).parents[1] / 'benchmarks/results/photographs.md').read_text()
    assert table in README.read_text()


def test_page_of_twins_is_that_of_the_registry():
    spec = importlib.util.spec_from_file_location('twins', Path(__file__).parents[1] / 'docs' / 'twins.py')
    twins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twins)
    written = twins.PAGE.read_text()
    if f'timm {timm.__version__}: ' not in written:
        pytest.skip(f'docs/twins.md is of another timm than {timm.__version__}: python docs/twins.py writes it anew')
    assert written == twins.page()
