"""The benchmark's contestants and images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

import cost  # noqa: E402
import int8  # noqa: E402
import loops  # noqa: E402
import sampling  # noqa: E402
import speed  # noqa: E402
import startup  # noqa: E402
import transforms  # noqa: E402
from contestants import CONTESTANTS, VARIANTS, create_contestant  # noqa: E402
from fashion import TASKS, CleanObjects, Crops, DistortedObjects, Distortion, load_fashion, load_task  # noqa: E402

import timm_apvit  # noqa: E402
from timm_apvit.cli.main import main  # noqa: E402
from timm_apvit.finetuning.clutter import Clutter, ClutteredObjects  # noqa: E402


@pytest.mark.parametrize('benchmark', [cost, int8, loops, sampling, speed, startup, transforms])
@pytest.mark.parametrize('output', ['no/such/folder/x.json', '.'])
def test_rejects_before_measuring_what_cannot_be_written(benchmark, output, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', '--output', output])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f'expected a file in a folder that exists, got {output!r}' in capsys.readouterr().err


def test_rejects_to_measure_no_rounds(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark', '--rounds', '0'])
    with pytest.raises(SystemExit):
        transforms.main()
    assert 'expected an integer >= 1' in capsys.readouterr().err


@pytest.mark.parametrize('name', CONTESTANTS)
def test_contestants_take_the_same_images_at_the_same_budget(name):
    model = create_contestant(name, 112, 16, None).eval()
    image = torch.rand(2, 1, 112, 112)
    logits = model(image)
    assert logits.shape == (2, 10)
    assert torch.equal(model(image), logits)  # tests are repeatable, by chance or not
    if name not in ('fixed', 'object'):
        assert model.num_patches == 16


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_lack_what_they_say(variant):
    torch.manual_seed(0)
    model = create_contestant('adaptive', 112, 16, None, variant)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = torch.rand(1, 1, 112, 112)
    geometry = model.patch_geometry(image)
    patching = model.patch_embed.patching
    logits = model.eval()(image)
    assert logits.shape == (1, 10)
    if variant == 'no-pyramid':
        # A patch covers 28 pixels with 16 samples: what lies between them is not seen.
        assert patching.transform.max_footprint(patching.layout, (112, 112), (16, 16)) == 1
    elif variant == 'no-context':
        far = image.clone()
        far[..., 64:, 64:] = 0
        # Group norm alone knows of the rest of the image.
        assert torch.allclose(model.patch_geometry(far).centres[:, 0], geometry.centres[:, 0], atol=2e-3)
    elif variant == 'no-geometry':
        assert not any('geometry_embed' in name for name, _ in model.named_parameters())
    else:
        usual = create_contestant('adaptive', 112, 16, None).patch_embed.patching.localizer
        localizer = patching.localizer
        assert (localizer.side, localizer.width) != (usual.side, usual.width)


def test_patches_by_chance_lie_elsewhere_in_every_training_image():
    model = create_contestant('random', 112, 16, None).train()
    centres = model.patch_geometry(torch.rand(1, 1, 112, 112).expand(2, -1, -1, -1)).centres
    assert (centres[0] - centres[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({}, 'square number'),
        ({'localizer': 'glance'}, 'adaptive patches only'),
        ({'variant': 'no-context'}, 'adaptive patches only'),
    ],
)
def test_rejects_unfair_contestants(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_contestant('fixed', 112, 16 if kwargs else 20, None, **kwargs)


def objects(**kwargs):
    images = np.random.default_rng(0).random((5, 28, 28)).astype(np.float32)
    clutter = Clutter(sides=(0.3, 0.3), pieces=0)
    return ClutteredObjects(images, np.arange(5), 6, 0, (1, 40, 40), (0.0,), (1.0,), clutter)


def test_crops_are_the_objects_own_boxes():
    source = objects()
    canvas, label, (y, x, side) = source.compose(2)
    crop, same_label = Crops(source, side)[2]
    assert same_label == label
    assert torch.allclose(crop[0], torch.from_numpy(canvas[y : y + side, x : x + side]), atol=1e-6)
    outside = canvas.copy()
    outside[y : y + side, x : x + side] = 0
    assert not outside.any()


def test_clean_objects_fill_the_canvas():
    source = objects()
    clean = CleanObjects(source.objects, source.labels, 6, 0, (1, 28, 28), (0.0,), (1.0,))
    image, label = clean[3]
    assert torch.allclose(image[0], torch.from_numpy(source.objects[label]), atol=1e-6)


def distorted(distortion, image=None, length=40):
    images = np.ones((1, 28, 28), np.float32) if image is None else image[None]
    return DistortedObjects(distortion, images, np.array([3]), length, 0, (1, 112, 112), (0.0,), (1.0,))


def test_distorted_objects_are_clean_ones_without_distortion():
    image = np.random.default_rng(0).random((28, 28)).astype(np.float32)
    clean, _, _ = CleanObjects(image[None], np.array([3]), 1, 0, (1, 112, 112), (0.0,), (1.0,)).compose(0)
    canvas, label, box = distorted(Distortion(side=1.0), image).compose(0)
    assert (label, box) == (3, (0, 0, 112))
    inner = slice(3, -3)  # beyond its outermost pixels it fades to the canvas
    np.testing.assert_allclose(canvas[inner, inner], clean[inner, inner], atol=1e-4)


@pytest.mark.parametrize('name', ['rotated', 'warped'])
def test_distorted_objects_lie_wholly_inside_the_canvas_each_in_its_own_way(name):
    task = TASKS[name]
    assert (task.side, task.channels) == (112, 1)
    source = distorted(task.distortion)
    shares, seen = [], set()
    for index in range(40):
        canvas, _, (y, x, side) = source.compose(index)
        np.testing.assert_array_equal(canvas, source.compose(index)[0])
        assert 0 <= canvas.min() <= canvas.max() <= 1.0001
        assert min(y, x) >= 0
        assert max(y, x) + side <= 112
        outside = canvas.copy()
        outside[y : y + side, x : x + side] = 0
        assert outside.max() < 0.6  # the last pixel, half covered
        shares.append(canvas.mean())
        seen.add(canvas.tobytes())
    assert 0.4 < np.mean(shares) < 0.6
    assert len(seen) == 40


def test_distortion_turns_shears_and_warps():
    """Where the object's edges lie: straight lines, parallel but in perspective, which is what its widths say."""
    widths = {}
    for name, distortion in {
        'none': Distortion(), 'shear': Distortion(shear=0.5), 'perspective': Distortion(perspective=0.6),
    }.items():  # fmt: skip
        canvas, _, _ = distorted(distortion).compose(0)
        rows = canvas.sum(axis=1)
        widths[name] = rows[rows > 20]
    assert np.ptp(widths['none'][2:-2]) < 1
    assert np.ptp(widths['shear'][2:-2]) < 2
    assert np.ptp(widths['perspective'][2:-2]) > 5


@pytest.mark.parametrize('name', ['rotated', 'warped', 'clean', 'cluttered'])
def test_tasks_load_training_and_test_images(name, tmp_path):
    for prefix in ('train', 't10k'):
        header = np.array([6, 28, 28], '>u4').tobytes()
        images = np.random.default_rng(0).integers(256, size=(6, 28, 28), dtype=np.uint8)
        (tmp_path / f'{prefix}-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03' + header + images.tobytes())
        labels = np.arange(6, dtype=np.uint8)
        (tmp_path / f'{prefix}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01' + header[:4] + labels.tobytes())
    task = TASKS[name]._replace(test_images=3)
    splits = load_task(task, 0, 5, tmp_path)
    assert (len(splits.train), len(splits.test)) == (5, 3)
    for image, label in (splits.train[4], splits.test[2]):
        assert image.shape == (1, 112, 112)
        assert label in range(6)
    crops = load_task(task, 0, 5, tmp_path, crop=64)
    assert crops.train[4][0].shape == (1, 64, 64)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'expected train-images-idx3-ubyte\.gz in'):
        load_fashion(tmp_path, train=True)


def test_families_are_timed_in_turns(run_main, capsys):
    rows = run_main(transforms, '--model', 'test_apvit', '--batch', '1', '--rounds', '3')['families']
    assert [row['family'] for row in rows] == ['ViT', *timm_apvit.TRANSFORMS]
    reference = next(row for row in rows if row['family'] == transforms.REFERENCE)
    assert reference['ratio_quartiles'] == [1, 1, 1]
    assert all(row['milliseconds'] > 0 and row['ratio_quartiles'] == sorted(row['ratio_quartiles']) for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.slow
def test_speed_is_that_of_two_references_and_the_parts_make_the_whole(run_main):
    setting = ['--batches', '1', '--rounds', '3', '--modes', 'forward', 'train', '--parts']
    rows = run_main(speed, '--models', 'apvit_tiny', '--tokens', '196', '49', *setting)['rows']
    assert [(row['mode'], row['tokens']) for row in rows] == [(m, n) for m in ('forward', 'train') for n in (196, 49)]
    for row in rows:
        assert row['to_full'] == sorted(row['to_full'])
        assert (row['to_few'] == row['to_full']) == (row['tokens'] == 196)
        adds = row['multiply_adds']
        assert 1 < adds['ours'] / adds.get('few', adds['full']) < 1.15
        parts = row['parts']
        assert min(parts.values()) > 0
        assert max(parts, key=parts.get) == ('blocks' if row['mode'] == 'forward' else 'everything else')


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='Peak memory is measured on Linux only.')
def test_sampling_is_held_against_other_ways_and_a_bound(run_main, monkeypatch):
    setting = sampling.Sampling(8, 64, 128, 'cpu')
    monkeypatch.setattr(sampling, 'memory', lambda way, args: sampling.peak(setting, way))
    found = run_main(sampling, '--tokens', '64', '--source', '128', '--rounds', '2')
    ways = {row['way']: row for row in found['ways']}
    assert list(ways) == list(sampling.WAYS)
    # An image each, but for pages that the process already had.
    assert ways['expanded']['peak_mib'] > 0.8 * 8 * 64 * 128 * 128 * 3 * 4 / 2**20 > ways['package']['peak_mib']
    for row in ways.values():
        assert row['of_bound'] == pytest.approx(row['milliseconds'] / found['bound_milliseconds'])
    assert ways['package']['package_is_faster_by'] == [1, 1, 1]


def test_all_ways_of_sampling_take_the_same_patches_where_nothing_aliases():
    setting = sampling.Sampling(2, 64, 16, 'cpu')  # each patch has more samples than pixels
    with torch.inference_mode():
        package, bilinear, expanded = (way(setting) for way in sampling.WAYS.values())
    torch.testing.assert_close(package.flatten(0, 1), expanded, rtol=0, atol=1e-5)
    torch.testing.assert_close(package.transpose(1, 2).flatten(2, 3), bilinear, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_startup_is_that_of_a_fresh_process(run_main):
    found = run_main(startup, '--model', 'apvit_tiny', '--processes', '1')
    assert found['import_milliseconds'] > 0
    assert found['creation_to_vit'] > 0
    assert len(found['runs']) == 1


def test_int8_is_measured_on_a_runs_own_test_images(run_main, tmp_path):
    sizes = {'img-size': 32, 'num-patches': 4, 'epochs': 1, 'samples': 8, 'test-samples': 20, 'batch-size': 2}
    options = [word for name, value in sizes.items() for word in (f'--{name}', str(value))]
    trained = str(tmp_path / 'trained')
    assert main(['finetune', '--output', trained, '--no-twin', '--device', 'cpu', '--threads', '1', *options]) == 0
    exact, rounded = run_main(int8, trained, '--speed-of', 'test_apvit', '--num-patches', '4', '--rounds', '1')['rows']
    assert exact['images'] == rounded['images'] == 20
    assert exact['loss'] == pytest.approx(rounded['loss'], abs=0.1)
    assert exact['loss'] != rounded['loss']
    assert rounded['mebibytes'] < 0.7 * exact['mebibytes']


@pytest.mark.slow
def test_the_command_and_a_loop_of_timms_parts_learn_the_same():
    own, timms = (loops.learn((name, 0, 128, 2)) for name in ('command', 'timm'))
    assert own['images'] == 1000
    assert own['loss'] == timms['loss'] < 2.31


def test_cost_is_that_of_the_localiser_and_the_sampling_above_all():
    added = cost.added_multiply_adds('apvit_tiny')
    assert 0 < added['added'] < 0.03 * added['vit']
    assert 0.9 * added['added'] < added['localiser'] + added['sampling'] < 1.1 * added['added']
