"""The command line tells a newcomer what there is, under both of its names, and a shell completes it."""

import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import timm_apvit.__main__
from timm_apvit.cli.main import COMMANDS, PROGRAM, main, make_parser

PROJECT = Path(__file__).parents[2] / 'pyproject.toml'


def said(capsys, *arguments):
    """Status and text of a command that ends by itself."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, capsys.readouterr()


def test_console_script_is_the_module():
    entry = re.search(r'^\[project\.scripts\]\n(\S+) = "(.*)"', PROJECT.read_text(), re.M)
    assert entry[1] == PROGRAM
    assert EntryPoint(entry[1], entry[2], 'console_scripts').load() is timm_apvit.__main__.main


def test_ctrl_c_while_modules_load_is_a_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, 'timm_apvit.cli.main', types.SimpleNamespace(main=interrupted))
    assert timm_apvit.__main__.main() == 130
    assert capsys.readouterr().err == 'interrupted; nothing was written\n'


@pytest.mark.parametrize(('path', 'name'), [
    ('/x/timm-apvit', 'timm-apvit'), (r'timm-apvit.exe', 'timm-apvit'), ('/x/__main__.py', 'python -m timm_apvit'),
])  # fmt: skip
def test_help_has_a_line_for_each_command_and_an_example_that_parses(path, name, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setattr(sys, 'argv', [path])
    status, output = said(capsys, '--help')
    assert status == 0
    assert output.out.startswith(f'usage: {name} ')
    lines = output.out.splitlines()
    for command in COMMANDS:
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f'    {command.name} ')] == [
            [command.name, command.help]
        ]
    examples = [line.strip().removeprefix(name).split() for line in lines if line.startswith(f'  {name} ')]
    assert [words[0] for words in examples] == ['finetune', 'evaluate', 'show']
    for words in examples:
        make_parser(name).parse_args(words)


@pytest.fixture
def own_family(tmp_path):
    """The file of the documentation's own family of transforms, as a module of another folder."""
    snippets = re.findall(r'```python\n(.*?)```', (PROJECT.parent / 'docs/patches.md').read_text(), re.S)
    (source,) = (snippet for snippet in snippets if 'register_transform' in snippet)
    (tmp_path / 'keystones.py').write_text(source.partition('model = ')[0])
    return tmp_path


@pytest.mark.slow
def test_models_of_an_own_family_are_trained_and_measured_where_its_module_is_named(own_family, capsys):
    trained = ['--img-size', '32', '--num-patches', '4', '--samples', '8', '--test-samples', '4', '--batch-size', '4']
    trained += ['--epochs', '1', '--no-twin', '--transform', 'keystone', '--output', 'run', '--device', 'cpu']
    assert main(['finetune', *trained]) == 2
    error = capsys.readouterr().err
    assert "got 'keystone'" in error
    assert '--import' in error
    script = Path(sys.executable).with_name(PROGRAM)
    module = [sys.executable, '-m', 'timm_apvit']
    # Unlike python -m, the script does not look for modules in the current folder by itself.
    installed = [str(script)] if script.exists() else module
    for command in ([*module, 'finetune', *trained], [*installed, 'evaluate', 'run', '--device', 'cpu']):
        command += ['--import', 'keystones']
        done = subprocess.run(command, cwd=own_family, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert 'keystone' in (own_family / 'run/best/config.json').read_text()


@pytest.mark.parametrize(('module', 'message'), [('no_such_module', 'ModuleNotFoundError'), ('broken', 'ZeroDivision')])
def test_rejects_modules_that_cannot_be_imported(module, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'broken.py').write_text('1 / 0')
    status, output = said(capsys, 'finetune', '--import', module)
    assert status == 2
    assert f'cannot import {module!r}: {message}' in output.err


def test_a_slip_of_an_option_names_the_nearest(capsys):
    status, output = said(capsys, 'finetune', '--epohcs', '3')
    assert status == 2
    assert 'unrecognized arguments: --epohcs; did you mean --epochs?' in output.err
    assert output.err.count('\n') == 1


def test_errors_are_a_line_or_with_debug_a_traceback(tmp_path, capsys):
    command = ['evaluate', str(tmp_path / 'none'), str(tmp_path), '--device', 'cpu']
    assert main(command) == 2
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises(FileNotFoundError, match='which does not exist'):
        main([*command, '--debug'])


def completions(script, *words):
    """What bash offers for the last of the words."""
    program = f"""
        source {script}
        COMP_WORDS=({' '.join(map(repr, words))}) COMP_CWORD={len(words) - 1}
        _shtab_timm_apvit
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    shown = subprocess.run(['bash', '-c', program], cwd=script.parent, capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    pytest.importorskip('shtab')
    if shutil.which('bash') is None:
        pytest.skip('bash is not installed')
    status, output = said(capsys, '--print-completion', 'bash')
    assert status == 0
    (tmp_path / 'completion').write_text(output.out)
    (tmp_path / 'photo.jpg').touch()
    offered = [
        completions(tmp_path / 'completion', PROGRAM, *words)
        for words in (
            ['fi'], ['evaluate', '--num-p'], ['show', 'pho'], ['run', 'compl'], ['evaluate', '--amp', ''],
            ['finetune', '--teacher', 'ph'],
        )
    ]  # fmt: skip
    expected = [{'finetune'}, {'--num-patches'}, {'photo.jpg'}, {'completion'}, {'bfloat16', 'float16'}, {'photo.jpg'}]
    assert offered == expected


def test_rejects_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    status, output = said(capsys, '--print-completion', 'zsh')
    assert status == 2
    assert "pip install 'timm-apvit[completion]'" in output.err
