"""Every command of README and docs/ is run from a fresh clone, in the order of its page, or the table of
`pages` says why not; all are read by the parsers of their commands. test_walk.py walks one page by itself."""
import re
import shlex
import subprocess
import sys

import pytest
from pages import INSTEAD, NOT_RUN, PAGES, ROOT, as_lines, blocks, clone, page_commands, run

from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.commands import recipe_flags, train, train_vae
from lit_jax.commands.bundle import BundleOptions
from lit_jax.commands.convert import ConvertOptions
from lit_jax.commands.export import ExportOptions
from lit_jax.commands.push import PushOptions
from lit_jax.commands.serve_page import PageOptions
from lit_jax.data.sources import is_own
from lit_jax.evaluation.evaluate_options import GenevalOptions, ReferenceOptions, ScoreOptions
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.recipes.recipe import finalize, load_recipe
from lit_jax.runtime.options import parse_options
from lit_jax.sampling.request import SampleRequest
from lit_jax.training import setup

OPTIONS = {'sample': SampleRequest, 'evaluate': ScoreOptions, 'evaluate reference': ReferenceOptions,
           'evaluate geneval': GenevalOptions, 'prepare_latents': PrepareOptions, 'analyze': AnalyzeOptions,
           'convert_torch_ckpt': ConvertOptions, 'app': PageOptions,
           'export': ExportOptions, 'push': PushOptions, 'bundle': BundleOptions}
# Pages with tests of their own: test_walk.py, test_api.py.
ELSEWHERE = [ROOT / 'docs' / 'start' / name for name in ('own_dit.md', 'python.md')]


def is_to_run(page) -> bool:
    """Whether there is more to run than what prepares for it."""
    return page not in ELSEWHERE and any(not re.match('export |mkdir ', line) and line not in INSTEAD.values()
                                         for line in as_lines(blocks(page)))


TO_RUN = [page for page in PAGES if is_to_run(page)]


def scripts() -> list[tuple[str, str, list[str]]]:
    """(page, script without .py, words) of every command of a script, in blocks and in the text, once.
    `...` stands for what is left out."""
    spans = [(page.name, command) for page in PAGES for command in
             (*page_commands(page), *re.findall(r'`(python \w+\.py [^`]+)`', page.read_text()))]
    found = [(page, *match.groups()) for page, command in spans
             if (match := re.search(r'python (\w+)\.py ?(.*)', command, re.S)) and '=...' not in command]
    return [(page, script, [word for word in shlex.split(rest) if word != '...'])
            for page, script, rest in dict.fromkeys(found)]


def test_flags():
    """Each command of a script is one that its parser takes, whether it can be run here or not."""
    wrong = []
    for page, script, words in scripts():
        verb = f'{script} {words[0]}' if words and f'{script} {words[0]}' in OPTIONS else script
        if verb not in OPTIONS:
            continue
        try:
            parse_options(OPTIONS[verb], words[len(verb.split()) - 1:], prog=script)
        except SystemExit:
            wrong.append((page, script, words))
    assert wrong == []


def test_the_table_names_what_is_there_and_nothing_in_vain():
    commands = [command for page in PAGES for command in page_commands(page)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, one) for one in commands)] == []
    named = {found[0] for why in NOT_RUN.values() if (found := re.match(r'tests/\S+\.py', why))}
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='needs a git repository')
def test_git_ignores_what_the_commands_make_and_nothing_of_the_project():
    def git(*words, text=None):
        return subprocess.run(['git', *words], cwd=ROOT, input=text, capture_output=True, text=True).stdout

    assert git('ls-files', '--cached', '--ignored', '--exclude-standard') == ''
    made = {name.rstrip('/') for page, _, words in scripts() for name in
            re.findall(r'--(?:out|workdir|prompts_out)(?:=| )([\w./-]+)', ' '.join(words))}
    made |= {f'{name}/x' for name in made if '.' not in name} - {'FOLDER/x', 'models/NAME/x'}
    made -= {name for name in made if f'{name}/x' in made} | {'FOLDER', 'models/NAME', 'gs/x'}
    ignored = git('check-ignore', '--no-index', '--stdin', text='\n'.join(made)).split()
    assert len(made) > 30
    assert made - set(ignored) == set()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with the files that pages tell their readers to write: [Block]."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = [block for page in PAGES for block in blocks(page) if block.title]
    for block in files:
        path = tmp_path / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    return files


def test_recipes_on_pages_are_recipes(written):
    for block in written:
        if block.title.startswith('configs/'):
            config = finalize(load_recipe(block.title), 1)
            assert not is_own(config.data.name) or len(setup.build_source(config))


@pytest.mark.slow
def test_training_commands_describe_a_run(written, monkeypatch):
    """Also those that cannot be run here: each is a recipe, with fields that it has and can be built."""
    from lit_jax.plan.dry_run import describe_recipe
    ours = {block.title for block in written}
    for page, script, words in scripts():
        words = [word for word in words if 'gs://' not in word and '$' not in word]
        name = next((word.partition('=')[2] for word in words if word.startswith('--config=')), '')
        if script not in ('train', 'train_vae') or not name or name.startswith('configs/student.py'):
            continue      # students need their teacher: test_walk.py
        where = f'{ROOT}/' if name.startswith('configs/') and name not in ours else ''
        others = [word for word in words if not word.startswith('--config=')]
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', f'--config={where}{name}', *others])
        if script == 'train_vae':
            assert recipe_flags.parse_recipe(train_vae.VaeOptions, section='vae')[0].vae, page
        else:
            config, _ = recipe_flags.parse_recipe(train.TrainOptions)
            assert describe_recipe(config)[0].startswith('recipe '), page


@pytest.mark.slow
@pytest.mark.parametrize('page', TO_RUN, ids=lambda page: page.stem)
def test_a_page_runs_from_a_fresh_clone(page, tmp_path):
    run(as_lines(blocks(page)), clone(tmp_path))
