"""The page that a run leaves behind."""
import json

import numpy as np

from lit_jax.report.grids import save_png
from lit_jax.report.html import Report, add_inheritance, loss_series, write_run_report


def test_text_is_escaped_and_images_are_inside(tmp_path):
    report = Report('a < b')
    report.heading('<script>')
    report.table(('leaf', 'count'), [('x & y', 3)])
    report.image(np.zeros((4, 4, 1), np.uint8), 'nothing', zoom=3)
    report.curves({'loss': ([1, 2], [0.1, 0.01])}, caption='falls', x_label='step', y_label='loss')
    report.write(tmp_path / 'report.html')
    page = (tmp_path / 'report.html').read_text()
    assert '<script>' not in page and '&lt;script&gt;' in page and 'x &amp; y' in page
    assert page.count('data:image/png;base64,') == 2 and 'width="12"' in page
    assert [path.name for path in tmp_path.iterdir()] == ['report.html']


def test_series_leave_out_what_a_record_lacks():
    records = [{'step': 1, 'a': 0.5}, {'step': 2, 'a': None}, {'step': 3, 'a': 0.25, 'b': 1.0}]
    assert loss_series(records, ['a', 'b', 'c']) == {'a': ([1, 3], [0.5, 0.25]), 'b': ([3], [1.0])}


def test_inheritance_is_counted(tmp_path):
    rows = [{'path': 'mlp', 'shape': [2, 3], 'count': 6, 'status': 'inherited', 'source': 'mlp'},
            {'path': 'attn', 'shape': [4], 'count': 4, 'status': 'fresh', 'source': None}]
    report = Report('r')
    add_inheritance(report, {'rows': rows, 'fixed': 2})
    report.write(tmp_path / 'r.html')
    said = '6 parameters inherited, 4 fresh, 2 of the fixed position table: 12 in all'
    assert said in (tmp_path / 'r.html').read_text()


def test_a_run_without_teacher_or_samples_has_a_report_too(tmp_path):
    records = [{'step': s, 'loss/total': 1 / s, 'loss/mse': 1 / s, 'loss/mse_q1': 1 / s} for s in (1, 2)]
    write_run_report(tmp_path, records, {'recipe': {'name': 'tiny', 'seed': 3}})
    page = (tmp_path / 'report.html').read_text()
    assert 'tiny' in page and json.dumps({'seed': 3})[1:-1].replace('"', '&quot;') in page


def test_what_is_no_figure_in_the_log_is_left_out(tmp_path):
    """Anybody may edit metrics.jsonl."""
    good = {'step': 1, 'loss/total': 0.5, 'loss/mse_q1': 0.5, 'align/error_00': 0.8, 'eval/fid': 3.0}
    bad = ['x' * 1000, [0.5], [[1], 2], {'a': 1}, None, 2 ** 4000, -1e308]
    records = [good, {'align/error_x': 1.0, 'step': 3},
               *({**good, name: value, 'step': 2} for name in good for value in bad),
               *({**good, 'step': value} for value in bad), good]
    for kept in (records, [{name: value for name, value in record.items() if name != 'eval/fid'}
                           for record in records]):
        write_run_report(tmp_path, kept, {'recipe': {'name': 'tiny'}})
    page = (tmp_path / 'report.html').read_text()
    assert 'Relative error by layer' in page and 'x' * 99 not in page


def test_samples_are_shown_large_with_the_names_of_their_classes_and_what_to_do_next(tmp_path):
    save_png(tmp_path / 'samples' / '000000200.png', np.zeros((20, 300, 3), np.uint8))
    write_run_report(tmp_path, [], {'recipe': {'name': 'tiny'}}, shown=['cats', 'cats', 'dogs'],
                     following=['python sample.py --from=a'])
    page = (tmp_path / 'report.html').read_text()
    assert 'EMA weights at step 200, row by row: cats (2), dogs' in page and 'width="1200"' in page
    assert '<h2>Next</h2>\n<pre>python sample.py --from=a</pre>' in page


def test_a_run_that_aligned_its_mixers_has_the_error_of_each_layer(tmp_path):
    aligned = [{'step': s, 'loss/align': 1 / s, 'align/error_00': 0.8 / s, 'align/error_01': 0.4 / s}
               for s in (1, 2)]
    write_run_report(tmp_path, [*aligned, {'step': 3, 'loss/mse': 0.1}], {'recipe': {'name': 'tiny'}})
    page = (tmp_path / 'report.html').read_text()
    assert 'Relative error by layer' in page and '<th>step 1</th><th>step 2</th>' in page
    assert '<td>1</td><td>0.4</td><td>0.2</td>' in page and '<td>mean</td><td>0.6</td><td>0.3</td>' in page
