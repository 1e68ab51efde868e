"""The pages of README and docs/ as code: their blocks, the commands in them, a clone to run them in, and the
table of what is not run.

A block is fenced, or indented by four spaces. Shell blocks have a line that starts with a program; python
blocks say so, and with title="FILE" they are that file.
"""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').rglob('*.md'))]
PROGRAMS = (r'(?:[A-Z_]+=\S* )*(?:python[\d.]*|\.venv/bin/\w+|pip|lit-jax|make|git|export|mkdir|bash|tail|'
            r'docker|gcloud|sbatch|nvidia-smi|tensorboard|ssh-add|launch/\w+\.sh)( |$)')
# What is not run, by the first pattern that is found in a command, and why: what no machine of the tests has,
# and what has a test of its own.
NOT_RUN = {
    r'pip install|git clone|-m venv|nvidia-smi': 'the environment of the tests is installed already',
    r'^make demo$': 'tests/examples/test_mnist_demo.py',
    r'^make lab$|-m examples\.mnist': 'tests/examples/test_mnist_demo.py: the lab takes hours',
    r'^make demo-t2i': 'tests/examples/test_shapes_demo.py',
    r'-m examples\.shapes': 'tests/examples/test_shapes_demo.py',
    r'^make photos$': 'tests/examples/test_photos.py',
    r'^make (test|lint|smoke|fuzz)|fuzz\.campaign': 'the tests themselves, as .ci/run has them',
    r'python app\.py': 'tests/app/test_browser.py',
    r'push\.py|hf://': 'tests/deploy/test_hub_models.py, with a stand-in of the hub',
    r'gcloud|docker|sbatch --nodes|ssh-add|tail -F|^launch/': 'tests/test_launch.py, with stand-ins',
    r'--coordinator': 'tests/training/test_processes_train.py',
    r'--plan=v|-m benchmarks\.(plans|forecast)': 'tests/plan/test_plan.py: compiles for minutes',
    r'-m benchmarks\.(gpu|runtimes)': 'tests/test_benchmarks.py: takes minutes',
    r'tensorboard': 'serves until it is stopped',
    r'models/mine\b': 'tests/test_walk.py, with a teacher that is there',
    r'(?i)[ds]it[-_]xl|lit_xl|sd[-_]vae|imagenet|configs/(lit_b\.py .*--workdir|paper/|baselines\.py)':
        'ImageNet, the released DiT and its VAE',
    r'(?i)pixart|PIPELINE|lit_t2i|sdxl_vae': 'the released PixArt, its VAE and T5',
    r'va_vae': "LightningDiT's VAE and latents; tests/latents, with files of the test's own",
    r'reference --data=folder': "Inception's published weights",
    r'CHECKPOINT|seen\.jsonl|runs/dydi_lit_s': 'a file of the reader',
}
# Runs are cut short by flags that the pages explain.
SHORT = {r'train\.py (?!.*--(?:dry_run|plan))|train_vae\.py ': '--config.train.steps=3',
         r'--num_samples=\d': '--num_samples=64'}
# What stands for a demo in the commands after it.
CONVERT = 'python convert_torch_ckpt.py assets/shapes_'
INSTEAD = {'make demo-t2i': f'{CONVERT}pixart.safetensors --out demo/shapes/teacher\n'
                            f'{CONVERT}t5 --text_dtype float32 --out demo/shapes/text_encoder'}


@dataclass(frozen=True)
class Block:
    page: str          # docs/start/python.md
    line: int          # of its first line of code
    kind: str          # shell, python or text
    text: str
    title: str = ''    # the file that it is

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, each on one line and without its comment."""
        if self.kind != 'shell':
            return []
        lines = (re.sub(r'(?:^|\s+)#.*', '', line) for line in re.sub(r'\\\n\s*', '', self.text).splitlines())
        return [line.strip() for line in lines if line.strip()]


def blocks(page: Path) -> list[Block]:
    """In the order of the page."""
    found, lines, name = [], page.read_text().splitlines(), str(page.relative_to(ROOT))
    at = 0
    while at < len(lines):
        fence = re.fullmatch(r'(\s*)```(\w*)(?: title="(.+)")?.*', lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == '```')
            text = '\n'.join(line.removeprefix(fence[1]) for line in lines[at + 1:end])
            kind = {'python': 'python', 'bash': 'shell'}.get(fence[2], 'text')
            found.append(Block(name, at + 2, kind, text, fence[3] or ''))
            at = end + 1
        elif lines[at].startswith('    ') and lines[at].strip() and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith('    ') or not lines[end].strip()):
                end += 1
            text = '\n'.join(line[4:] for line in lines[at:end]).rstrip()
            kind = 'shell' if re.search(f'^{PROGRAMS}', text, re.M) else 'text'
            found.append(Block(name, at + 1, kind, text))
            at = end
        else:
            at += 1
    return found


def page_commands(page: Path) -> list[str]:
    return [command for block in blocks(page) for command in block.commands]


def clone(folder: Path) -> Path:
    """A fresh clone of what is committed, with the interpreter of the tests as its .venv."""
    if not (ROOT / '.git').exists():
        import pytest
        pytest.skip('needs a git repository')
    subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(folder / 'lit_jax')], check=True)
    (folder / 'lit_jax' / '.venv').symlink_to(sys.prefix)
    (folder / 'home').mkdir()
    return folder / 'lit_jax'


def run(lines: list[str], where: Path, timeout: float = 1_500) -> str:
    """What one shell prints that runs these lines in a clone, with an empty HOME. AssertionError with the end
    of it if one of them fails."""
    keep = ('LANG', 'LC_ALL', 'TMPDIR', 'JAX_COMPILATION_CACHE_DIR')
    env = {name: os.environ[name] for name in keep if name in os.environ}
    if cache := env.get('JAX_COMPILATION_CACHE_DIR'):
        env['JAX_COMPILATION_CACHE_DIR'] = os.path.abspath(cache)
    env |= {'HOME': str(where.parent / 'home'), 'JAX_PLATFORMS': 'cpu', 'PS4': '$ ',
            'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}
    done = subprocess.run(['bash', '-euxo', 'pipefail', '-c', '\n'.join(lines)], cwd=where, env=env,
                          text=True, timeout=timeout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, f'status {done.returncode}:\n{done.stdout[-6_000:]}'
    return done.stdout


def is_left_out(text: str) -> bool:
    """Whether a command or a block of python is in the table of what is not run."""
    return any(re.search(pattern, text) for pattern in NOT_RUN)


def as_run(command: str) -> str:
    """What a test runs for a command: '' for nothing."""
    if command.startswith('export '):
        return command
    if command in INSTEAD:
        return INSTEAD[command]
    if is_left_out(command):
        return ''
    if '--dry_run' in command:
        return f'{command} || [ $? = 1 ]      # 1: something is missing'
    return ' '.join([command, *(flags for pattern, flags in SHORT.items() if re.search(pattern, command))])


def as_lines(found: list[Block]) -> list[str]:
    """The lines that do what the blocks of a page say, in their order. Files are written where they stand;
    other python blocks are one program, where the last of them stands."""
    python = [block for block in found if block.kind == 'python' and not block.title
              and not is_left_out(block.text)]
    lines = []
    for block in found:
        lines += filter(None, map(as_run, block.commands))
        if block.title:
            lines += [f'mkdir -p {shlex.quote(str(Path(block.title).parent))}',
                      f"cat > {shlex.quote(block.title)} <<'END_OF_BLOCK'\n{block.text}\nEND_OF_BLOCK"]
        elif python and block is python[-1]:
            text = '\n'.join(block.text for block in python)
            lines.append(f"python - <<'END_OF_BLOCK'\n{text}\nEND_OF_BLOCK")
    return lines
