"""Benchmarks say what changed."""
from benchmarks import forecast


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
