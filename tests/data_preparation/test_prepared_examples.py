from datasets import Dataset

from gengram import GengramTokenizer
from gengram.data_preparation.prepared_examples import digits_of

TEXTS = ["ACGTTGCAAATTGAC<EOD>ACNT", "GGCTA", "TTT"]


def test_digits_are_the_alphabet():
    examples = Dataset.from_dict({"input_ids": [GengramTokenizer()(text)["input_ids"] for text in TEXTS]})
    assert [row.tolist() for row in digits_of(examples)][1:] == [[2, 2, 1, 3, 0], [3, 3, 3]]
    assert next(digits_of(examples)).tolist()[-5:] == [4, 0, 1, 4, 3]
