import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

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


@pytest.mark.parametrize("seed", [-1, -7])
def test_a_negative_seed_is_an_error(seed):
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3, seed=seed)


def hidden_of(data: list[dict], collator: DataCollatorForGenomeModeling, epochs: int = 1, **loading) -> list[list]:
    """Of each epoch, what is hidden of each example."""
    loader = DataLoader(data, collate_fn=collator, **loading)
    found = []
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        found.append([row.tolist() for batch in loader for row in batch["labels"]])
    return found


def test_masks_of_a_seed_do_not_depend_on_workers_and_batches_and_differ_between_epochs():
    data = examples(*[letter + "ACGTTGCAGG" * 6 for letter in "ACGT"])

    def collator():
        return DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3, seed=0)

    expected = hidden_of(data, collator(), epochs=2, batch_size=1)
    assert len({str(row) for epoch in expected for row in epoch}) == 8
    assert hidden_of(data, collator(), epochs=2, batch_size=4) == expected
    for persistent in (False, True):
        loading = {"num_workers": 2, "persistent_workers": persistent}
        assert hidden_of(data, collator(), epochs=2, batch_size=2, **loading) == expected
    other = hidden_of(data, DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3, seed=1), batch_size=1)
    assert other[0] != expected[0]


def test_without_a_seed_workers_and_epochs_hide_different_bases():
    data = examples(*["ACGTTGCAGG" * 6] * 4)
    collator = DataCollatorForGenomeModeling(TOKENIZER, mask_probability=0.3)
    torch.manual_seed(0)
    first = hidden_of(data, collator, epochs=2, batch_size=1, num_workers=2)
    assert len({str(row) for epoch in first for row in epoch}) == 8
    torch.manual_seed(0)
    assert hidden_of(data, collator, epochs=2, batch_size=1, num_workers=2) == first
