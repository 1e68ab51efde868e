"""GenEval's list of prompts comes out byte by byte, and the folders for their images are laid out."""
import collections
import hashlib
import json

import pytest

from lit_jax.metrics.geneval.geneval_prompts import (
    TASKS,
    make_prompts,
    metadata_text,
    plural,
    prompts_text,
    with_article,
    write_prompts,
)

# Of the files in djghosh13/geneval@af4902f, prompts/.
METADATA_SHA256 = '5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13'
PROMPTS_SHA256 = '55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680'


def test_the_files_are_the_published_ones():
    assert hashlib.sha256(metadata_text().encode()).hexdigest() == METADATA_SHA256
    assert hashlib.sha256(prompts_text().encode()).hexdigest() == PROMPTS_SHA256


def test_tasks_have_their_numbers_in_their_order():
    tags = [prompt['tag'] for prompt in make_prompts()]
    counts = collections.Counter(tags)
    assert [counts[task] for task in TASKS] == [80, 99, 80, 94, 100, 100]
    assert list(dict.fromkeys(tags)) == list(TASKS)
    assert len(tags) == 553


def test_entries_say_what_their_text_says():
    by_task = {prompt['tag']: prompt for prompt in make_prompts()}
    for prompt in make_prompts():
        for wanted in prompt['include']:
            assert wanted['class'] in prompt['prompt']
            assert wanted.get('color', '') in prompt['prompt']
    position = by_task['position']
    second, first = position['include']
    relation, target = first['position']
    assert target == 0
    assert position['prompt'].endswith(f'{first["class"]} {relation} {with_article(second["class"])}')
    counting = by_task['counting']
    assert counting['exclude'] == [{'class': counting['include'][0]['class'],
                                    'count': counting['include'][0]['count'] + 1}]


@pytest.mark.parametrize('words, expected',
                         [('apple', 'an apple'), ('red apple', 'a red apple'), ('umbrella', 'an umbrella'),
                          ('hair drier', 'a hair drier')])
def test_article(words, expected):
    assert with_article(words) == expected


@pytest.mark.parametrize('name, expected', [('bus', 'buses'), ('sheep', 'sheeps'), ('knife', 'knifes')])
def test_plural(name, expected):
    assert plural(name) == expected


def test_folders_are_laid_out(tmp_path):
    assert write_prompts(tmp_path / 'geneval') == 553
    out = tmp_path / 'geneval'
    assert (out / 'evaluation_metadata.jsonl').read_text() == metadata_text()
    assert (out / 'generation_prompts.txt').read_text() == prompts_text()
    for number in (0, 552):
        assert json.loads((out / f'{number:05d}' / 'metadata.jsonl').read_text()) == make_prompts()[number]
        assert (out / f'{number:05d}' / 'samples').is_dir()
    assert len(list(out.glob('?????'))) == 553
