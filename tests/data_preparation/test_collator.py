import numpy as np
import pytest
import torch

from gengram import GengramTokenizer
from gengram.data_preparation import DataCollatorForGenomeModeling

TOKENIZER = GengramTokenizer()


def examples(*texts: str) -> list[dict]:
    return [{"input_ids": np.array(TOKENIZER(text)["input_ids"], dtype=np.uint8)} for text in texts]


def test_only_bases_carry_a_loss():
    batch = DataCollatorForGenomeModeling(TOKENIZER)(examples("ACNGT<EOD>A", "TT"))
    assert batch["input_ids"].dtype == torch.int64
    assert TOKENIZER.decode(batch["input_ids"][0]) == "ACNGT<EOD>A"
    expected = batch["input_ids"].clone()
    expected[0, [2, 5]] = -100
    expected[1, 2:] = -100
    assert torch.equal(batch["labels"], expected)
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
    assert "attention_mask" not in DataCollatorForGenomeModeling(TOKENIZER)(examples("AC", "GT"))


def test_masked_modelling_hides_bases_in_the_stated_shares():
    texts = ["ACGTN" * 2000, "TTTTN" * 2000]
    batch = DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3, seed=1)(examples(*texts))
    original = DataCollatorForGenomeModeling(TOKENIZER)(examples(*texts))["input_ids"]
    hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][hidden], original[hidden])
    assert torch.equal(batch["input_ids"][~hidden], original[~hidden])
    assert not (hidden & (original == TOKENIZER.nucleotide_ids[4])).any()
    bases = original != TOKENIZER.nucleotide_ids[4]
    assert abs(hidden[bases].float().mean() - 0.3) < 0.02
    is_mask = batch["input_ids"] == TOKENIZER.mask_token_id
    assert abs(is_mask[hidden].float().mean() - 0.8) < 0.03
    kept = batch["input_ids"] == original
    assert abs(kept[hidden].float().mean() - 0.125) < 0.03  # a random letter is the right one in a quarter
    again = DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3, seed=1)(examples(*texts))
    assert torch.equal(again["input_ids"], batch["input_ids"])


def test_a_share_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="mask_probability"):
        DataCollatorForGenomeModeling(TOKENIZER, mask_probability=1.5)
