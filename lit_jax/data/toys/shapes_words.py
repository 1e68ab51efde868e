"""The language of captions of rendered shapes: vocabulary, all captions, and a word tokenizer.

A noun phrase is one object ('a circle', 'an orange square') or several ('two circles', 'three red squares');
a caption is one phrase, or two with 'and' or a relation between them. Scoring uses the same words."""
import itertools

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path

CLASSES = ('circle', 'square', 'triangle')
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple')
RELATIONS = ('left of', 'right of', 'above', 'below')
NUMBERS = {2: 'two', 3: 'three', 4: 'four'}
VOCABULARY = tuple(sorted({'a', 'an', 'and', 'left', 'right', 'of', 'above', 'below', *NUMBERS.values(),
                           *COLOURS, *CLASSES, *(name + 's' for name in CLASSES)}))
SPECIAL = ('<pad>', '</s>', '<unk>')          # ids 0, 1, 2, as in T5
TOKENIZER_FILE = 'tokenizer.json'


def phrase(name: str, colour: str = '', count: int = 1) -> str:
    """'a circle', 'an orange circle', 'two circles', 'two orange circles'."""
    words = f'{colour} {name}'.strip()
    if count > 1:
        return f'{NUMBERS[count]} {words}s'
    return f'{"an" if words[0] in "aeiou" else "a"} {words}'


def pair(first: str, second: str, relation: str = '') -> str:
    """Two phrases: 'a circle and a square', 'a circle left of a square'."""
    return f'{first} {relation or "and"} {second}'


def all_captions() -> tuple[str, ...]:
    """All 1,158 captions, sorted."""
    colours = ('', *COLOURS)
    ones = [phrase(name, colour) for name in CLASSES for colour in colours]
    several = [phrase(name, colour, count) for name in CLASSES for colour in colours for count in NUMBERS]
    pairs = [pair(phrase(a, colour_a), phrase(b, colour_b), relation)
             for a, b in itertools.permutations(CLASSES, 2) for relation in ('', *RELATIONS)
             for colour_a, colour_b in (('', ''), *itertools.product(COLOURS, COLOURS))
             if relation or not colour_a or colour_a != colour_b]
    return tuple(sorted({*ones, *several, *pairs}))


def make_tokenizer(folder) -> str:
    """Writes FOLDER/tokenizer.json and returns its path: one token per word of VOCABULARY, ids from 3.

    Other words become <unk>; </s> is added at the end. Letter case is ignored, and punctuation is one unknown
    word: 'A red circle.' is 'a red circle' and <unk>. Needs the tokenizers library."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise UserError('making a tokenizer needs the package tokenizers: pip install tokenizers') from error
    ids = {word: number for number, word in enumerate((*SPECIAL, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', ids['</s>'])])
    tokenizer.add_special_tokens(list(SPECIAL))
    path = as_path(folder) / TOKENIZER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_str(pretty=True))
    return str(path)
