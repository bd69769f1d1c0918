"""Caption scores against pycocoevalcap's own numbers, recorded, and against the package where it is installed."""

import numpy as np
import pytest

from fusedvlm.evaluation.tasks.caption_scores import bleu, bleu_counts, cider, common_length, ptb_words, rouge_l

CAPTIONS = ["a dog sits on the Grass.", "red table with a cat", "", "the dog runs , runs and runs", "a cat on a cat"]
REFERENCES = [
    ["a dog sits on grass.", "the dog is on the Grass."],
    ["a red table", "table with a blue cat on it", "a cat"],
    ["nothing to see"],
    ["the dog runs", "a dog runs and sits"],
    ["a cat on a mat", "the cat"],
]
# pycocoevalcap 1.2, Bleu(4), Cider() and Rouge() on the texts as they stand.
BLEU = [0.8260869564858223, 0.8075728530484404, 0.6726514271664142, 0.4850113240107332]
CIDER = [4.266601759814935, 2.44120184076152, 0.0, 2.360224350278083, 3.1137469983204067]
ROUGE = [0.7393939393939394, 0.9070631970260222, 0.0, 0.646643109540636, 0.8]


def test_scores_are_those_of_pycocoevalcap():
    assert bleu(bleu_counts(CAPTIONS, REFERENCES)) == pytest.approx(BLEU, abs=1e-12)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(CIDER, abs=1e-12)
    found = [rouge_l(caption, texts) for caption, texts in zip(CAPTIONS, REFERENCES, strict=True)]
    assert found == pytest.approx(ROUGE, abs=1e-12)


def test_scores_against_the_package_on_random_texts():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is in the environment of make env-vlmeval alone")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    generator = np.random.default_rng(0)
    words = ["a", "the", "dog", "cat.", "sits", "runs,", "on", "grass", "Table", "red"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 12))) for _ in range(80)]
    captions, references = texts[:20], [texts[20 + 3 * n : 23 + 3 * n] for n in range(20)]
    right, said = dict(enumerate(references)), {number: [text] for number, text in enumerate(captions)}
    assert Bleu(4).compute_score(right, said, verbose=0)[0] == pytest.approx(bleu(bleu_counts(captions, references)))
    assert Cider().compute_score(right, said)[1] == pytest.approx(cider(captions, references))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog doesn't sit (there), it's running.", "a dog does n't sit -lrb- there -rrb- it 's running"),
        ("The U.S. flag, at 10:45 a.m. costs $1,000.50!", "the u.s. flag at 10:45 a.m. costs $ 1,000.50"),
        ("two men's hats -- one 'big' one; can't cannot gonna", "two men 's hats one big one ca n't can not gon na"),
        ('a "stop" sign... near the road', "a stop sign near the road"),
        ("They're 3-4 people's bikes & a cat: black.", "they 're 3-4 people 's bikes & a cat black"),
        ("it's 5 o'clock.", "it 's 5 o'clock"),
    ],
)
def test_penn_treebank_words(text, words):
    assert ptb_words(text) == words


def test_longest_common_subsequence_against_its_definition():
    def naive(one: str, other: str) -> int:
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + naive(one[1:], other[1:])
        return max(naive(one[1:], other), naive(one, other[1:]))

    for one, other in [("abcbdab", "bdcaba"), ("", "a"), ("aaa", "aa")]:
        assert common_length(one, other) == naive(one, other)
