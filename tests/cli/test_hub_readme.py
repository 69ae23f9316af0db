"""What the documentation shows of the Hub runs."""

import re
import shlex
from pathlib import Path

import pytest
import timm
from hub_server import serve
from hub_uploads import WritableHub, run_client
from images import write_images
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / 'docs/hub-and-export.md'


def test_section_runs(tmp_path: Path) -> None:
    """What the documentation shows of the Hub, as it stands but for the folders."""
    section = PAGE.read_text().partition('# To the Hub')[2].partition('\n# ')[0]
    block = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
    finetune, evaluate, push_run = (
        shlex.split(line, comments=True)[1:] for line in re.findall(r'^    (timm-apvit .*)', section, re.M)
    )
    tiny = ['--model', 'test_apvit', '--img-size', '32', '--num-patches', '2', '--epochs', '1', '--batch-size', '4']
    for n, name in enumerate(('train/owl', 'train/tit', 'val/owl', 'val/tit')):
        write_images(tmp_path / 'DATA' / name, 4, seed=n)
    checkpoint = ['--checkpoint', str(tmp_path / 'vit.safetensors')]
    save_file(timm.create_model('test_vit').state_dict(), checkpoint[1])
    own = [*tiny, *checkpoint, '--workers', '0', '--output', 'runs/x']
    finetune = [word for word in finetune if word != '--pretrained'] + own
    script = f"""import os, timm_apvit
os.chdir({str(tmp_path)!r})
{block}
assert model.num_patches == 98
assert model.pretrained_cfg['label_names'] == ['owl', 'tit']
from timm_apvit.cli.main import main
assert main({finetune!r}) == 0
assert main({evaluate!r}) == 0
assert main({push_run!r}) == 0
"""
    with serve({}, WritableHub) as server:
        process = run_client(server, tmp_path / 'home', script, HF_TOKEN='hf_mine')
        assert process.returncode == 0, process.stderr
        assert server.private == {'me/apvit-birds'}
        assert set(server.branches['me/apvit-birds']) == {'larger'}
        card = server.branches['me/apvit-birds']['larger']['README.md'].decode()
        assert 'M multiply-adds' in card
