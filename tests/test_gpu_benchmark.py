"""What a GPU is measured by, on the CPU at reduced size, so that it cannot rot."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))

import checks
import gpu


def test_all_that_a_gpu_is_measured_by_runs_at_reduced_size(run_main, capsys):
    found = run_main(gpu, '--device', 'cpu')
    assert {each['check']: each['holds'] for each in found['checks']} == {
        name: None if name in ('CUDA graph', 'memory', 'compiled') else True for name in checks.CHECKS
    }
    assert len(found['rows']) == len(gpu.cases(reduced=True))
    assert min(row['images_per_second']['ours'] for row in found['rows']) > 0
    assert found['sampler'][0]['package'] > 0
    assert found['failed'] == found['no_time_for'] == []
    last = f'Of {len(checks.CHECKS)} targets: {len(checks.CHECKS) - 3} hold; 3 not known: CUDA graph, memory, compiled.'
    assert capsys.readouterr().out.splitlines()[-1] == found['verdict'] == last


def test_what_fails_on_a_gpu_is_told_and_the_rest_goes_on(run_main, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError('no kernel image is available\nand more')

    monkeypatch.setattr(gpu, 'CHECKS', {'learns': broken, 'identity': checks.identity})
    monkeypatch.setattr(gpu, 'measure', broken)
    found = run_main(gpu, '--device', 'cpu')
    assert [each['holds'] for each in found['checks']] == [False, True]
    assert len(found['failed']) == len(gpu.cases(reduced=True))
    assert 'FAILED  learns                RuntimeError: no kernel image is available\n' in capsys.readouterr().out
    assert found['verdict'] == 'Of 2 targets: 1 hold; 1 MISSED: learns.'


def test_targets_of_a_gpu_are_read_from_the_cases_that_they_are_about():
    cases = gpu.cases(reduced=False)
    rows = [{**case, 'to_full': [1.0, 1.04, 1.1]} for case in cases]
    found = {'checks': [], 'rows': rows, 'sampler': [{'package': 1.9}]}
    assert gpu.verdict(found, False) == 'Of 3 targets: 2 hold; 1 MISSED: apvit_small, compiled <= 1.03 x the ViT.'
    assert gpu.verdict({**found, 'rows': rows[1:], 'sampler': []}, False) == (
        'Of 3 targets: 1 hold; 2 not known: apvit_small, compiled <= 1.03 x the ViT, sampler <= 2 x its bound.'
    )
