"""Benchmarks run to their end on the smallest sizes, so that no minute of an accelerator is lost to a typing
error."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision_shim import import_oracle

from benchmarks import forecast, gpu
from benchmarks.gpu_stages import STAGES

ROOT = Path(__file__).parents[1]


def run(*command, timeout=900):
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    done = subprocess.run([sys.executable, '-m', *command], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.peers
def test_all_stages_for_a_gpu_run_on_a_cpu_and_go_on(tmp_path):
    out = tmp_path / 'tiny.json'
    run('benchmarks.gpu', '--tiny', '--minutes=12', f'--out={out}', '--stages=ceilings')
    first = json.loads(out.read_text())['stages']['ceilings']
    rest = [stage for stage in STAGES if stage != 'text_to_image']
    run('benchmarks.gpu', '--tiny', '--minutes=12', f'--out={out}', f'--stages={",".join(rest)}')
    import_oracle('diffusers')
    gpu.run_stage('text_to_image', str(out), tiny=True)
    found = json.loads(out.read_text())
    assert set(found['stages']) == set(STAGES) and found['stages']['ceilings'] == first
    assert not [row for rows in found['stages'].values() for row in rows.items() if 'error' in row[1]]
    assert 'GB/s' in (tmp_path / 'tiny.md').read_text() and found['machine']['versions']['jax']


@pytest.mark.slow
@pytest.mark.parametrize('figure', ['lit_4', 'lit_5', 'lit_9', 'dig', 'dydi'])
def test_a_figure_is_drawn_and_tabulated(figure, tmp_path):
    run('benchmarks.efficiency', f'--figure={figure}', '--tiny', f'--out={tmp_path}')
    assert 'Published: ' in (tmp_path / f'{figure}.md').read_text()
    assert (tmp_path / f'{figure}.png').read_bytes().startswith(b'\x89PNG')


def test_a_forecast_is_compared_with_the_last_one():
    last = {'ms': 10.0, 'mfu': 0.5, 'parts': {'feed-forward': 4.0, 'adaLN': 1.0}}
    slower = {'ms': 11.0, 'mfu': 0.45, 'parts': {'feed-forward': 5.0, 'adaLN': 1.0}}
    said = forecast.compare(last, slower)
    assert said == '; SLOWER by 10.0% (10.00 ms before), feed-forward 4.0 to 5.0 ms'
    assert forecast.compare(slower, last).startswith('; faster by 9.1%')
    assert forecast.compare(last, {**last, 'ms': 10.1}) == '' == forecast.compare(None, last)
    text = forecast.tables({'lit_xl on v5e:4x4': {**last, 'peak_ms': 5.0, 'links_ms': 2.0, 'batch': 256},
                            'linear 256 on v5e': {'ms': 1., 'mfu': .5, 'roofline_ms': .5, 'temporaries': 0}})
    assert '| lit_xl | v5e:4x4 | 256 | 10.0 |' in text
    assert '| linear | 256 | v5e | 1.000 | 0.500 | 2.00 |' in text
    assert 'No TPU has confirmed' in text
