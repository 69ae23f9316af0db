"""The page on which one sees where a model looks."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import timm
import torch

from timm_apvit import save_pretrained
from timm_apvit.cli.main import main
from timm_apvit.demo import page
from timm_apvit.demo.page import EXAMPLES, OWN, Viewer

CHELSEA = EXAMPLES / 'chelsea.jpg'


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Times that nobody reads."""
    monkeypatch.setattr(page, 'SECONDS', 0.01)


@pytest.fixture(scope='module')
def viewer():
    return Viewer(random=True)


def test_a_view_has_a_picture_the_likeliest_classes_and_both_times(viewer):
    seen = viewer.see('test_apvit', OWN, CHELSEA, 16, 'order')
    assert seen.picture.ndim == 3
    assert seen.picture.std() > 10
    assert len(seen.classes) == 5
    assert all(not name.isdigit() and 0 < share < 1 for name, share in seen.classes.items())
    assert seen.times.endswith('fixed grid of 4x4 of the image made smaller')
    assert viewer.load('test_apvit', None).num_patches == 100  # as before


def test_two_classes_of_one_name_are_told_apart(viewer):
    model = viewer.load('test_apvit', None)
    logits = torch.zeros(1, 1000)
    logits[0, 134], logits[0, 517] = 3.0, 2.0  # a bird and a machine
    assert [name for name in page.likeliest(model, logits) if 'crane' in name] == ['crane (134)', 'crane (517)']


@pytest.mark.parametrize('transform', [OWN, 'tps'])
def test_pictures_differ_by_transform_and_number_and_colour(viewer, transform):
    first, fewer, attended = (
        viewer.see('test_apvit', transform, CHELSEA, number, colour).picture
        for number, colour in ((9, 'order'), (4, 'order'), (9, 'attention'))
    )
    assert first.shape != fewer.shape or (first != fewer).any()
    assert first.shape != attended.shape or (first != attended).any()


def test_a_model_of_ones_own_has_its_own_weights_and_names(viewer, tmp_path):
    model = viewer.load('test_apvit', 'scale')
    model.reset_classifier(2)
    torch.nn.init.constant_(model.head.bias, 0.0)
    save_pretrained(model, tmp_path, label_names=['cat', 'rocket'])
    viewer.load.cache_clear()
    seen = viewer.see(str(tmp_path), OWN, CHELSEA, 9, 'order')
    assert set(seen.classes) == {'cat', 'rocket'}
    assert viewer.numbers(str(tmp_path)) == (100, 100)


@pytest.mark.parametrize(
    ('name', 'content', 'error'),
    [('broken.jpg', b'no image', 'Pillow does not know its format'), ('absent.jpg', None, 'does not exist')],
)
def test_rejects_files_that_are_no_images(viewer, tmp_path, name, content, error):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=error):
        viewer.see('test_apvit', OWN, tmp_path / name, 9, 'order')
    assert viewer.load('test_apvit', None).num_patches == 100


def test_keeps_the_layout_of_a_model_until_another_number_is_asked_for(viewer, tmp_path, monkeypatch):
    model = timm.create_model('test_apvit', num_patches=(3, 17))
    save_pretrained(model, tmp_path)
    most, own = viewer.numbers(str(tmp_path))
    assert (most, own) == (100, 51)
    layouts = []
    monkeypatch.setattr(page, 'plot_patches', lambda model, *args, **kwargs: layouts.append(model.patch_embed.layout))
    monkeypatch.setattr(page.load_drawing(), 'rendered', lambda *args: None)
    for number in (own, 50):
        viewer.see(str(tmp_path), OWN, CHELSEA, number, 'order')
    assert [layout.grids[0].grid[0] for layout in layouts] == [3, 7]


def test_rejects_no_model(viewer):
    with pytest.raises(ValueError, match='expected a model, got none'):
        viewer.see('', OWN, CHELSEA, 9, 'order')


@pytest.mark.slow
def test_says_where_it_cannot_serve():
    pytest.importorskip('gradio')
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, '-m', 'timm_apvit', 'demo', 'test_apvit', '--random', '--port', port]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert f'cannot serve at 127.0.0.1, port {port}' in found.stderr


def test_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert main(['demo', 'test_apvit', '--random']) == 2
    assert "pip install 'timm-apvit[demo]'" in capsys.readouterr().err


def test_rejects_a_model_that_is_none(capsys):
    pytest.importorskip('gradio')
    assert main(['demo', 'apvit_smal', '--random']) == 2
    assert 'apvit_small' in capsys.readouterr().err


@pytest.fixture
def address(unused_port):
    """Of the page, served by the command."""
    pytest.importorskip('gradio')
    command = [sys.executable, '-m', 'timm_apvit', 'demo', 'test_apvit', '--random', '--port', str(unused_port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f'http://127.0.0.1:{unused_port}'
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
        process.terminate()


@pytest.fixture
def unused_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('chromium') is None, reason='needs Chromium')
def test_in_a_browser_pictures_come_and_change_and_a_broken_file_is_told(address, tmp_path):
    sync_api = pytest.importorskip('playwright.sync_api')
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'no image')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1400, 'height': 1000})
        page.goto(address)
        page.set_input_files('input[type=file]', str(CHELSEA))
        page.get_by_text('fixed grid of 10x10').wait_for(timeout=60_000)
        picture = page.locator('img[src*="image.png"]')
        first = picture.get_attribute('src')
        slider = page.get_by_role('slider').first
        slider.focus()
        slider.press('Home')
        slider.dispatch_event('pointerup')
        page.get_by_text('fixed grid of 1x1').wait_for(timeout=60_000)
        assert picture.get_attribute('src') != first
        page.get_by_label('attention').check()
        page.locator(
            'button[aria-label="Clear"], button[title="Clear"], button[aria-label="Remove Image"]'
        ).first.click()
        page.get_by_text('drop a photograph').wait_for(timeout=60_000)
        page.set_input_files('input[type=file]', str(broken))
        page.get_by_text('Pillow does not know its format').wait_for(timeout=60_000)
        browser.close()
