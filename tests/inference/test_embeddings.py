import random

import numpy as np
import pytest
import torch
from embedding_oracle import best_windows, embedding, pooled, strand_vectors
from foreign_models import bert, foreign_tokenizer, gpt2, llama
from tokenizers import Tokenizer, models
from tolerances import SAME_HIDDEN_STATES_FP32
from transformers import AutoModel, MambaConfig, MambaModel, PreTrainedTokenizerFast

from gengram import GengramModel, GengramTokenizer
from gengram.inference.base_tokens import BaseTokens
from gengram.inference.embeddings import SequenceEncoder, embed_sequences
from gengram.inference.hidden_states import HiddenStates
from gengram.inference.loaded_model import LoadedModel
from gengram.inference.pooling import POOLINGS
from gengram.sequences.alphabet import reverse_complement
from gengram.support.errors import InputError

SEQUENCES = ["ACGTTGCA", "A", "TTGACAGGCTATTTACGACGATTACG", "ACGT" * 30 + "TTG", "GGN"]


def random_sequences(count, longest, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices("ACGTacgtN", k=generator.randint(1, longest))) for _ in range(count)]


def mamba():
    """A causal model without attention."""
    torch.manual_seed(0)
    model = MambaModel(MambaConfig(vocab_size=10, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    return model, foreign_tokenizer()


class NoMask(torch.nn.Module):
    """A masked model that takes no attention mask, as Caduceus."""

    def __init__(self):
        super().__init__()
        self.inner, _ = bert()
        self.config = self.inner.config

    def forward(self, input_ids, output_hidden_states=None):
        return self.inner.base_model(input_ids=input_ids, output_hidden_states=output_hidden_states)


# A model, the tokens in front of a sequence, whether it sees both sides, and how it is padded.
FOREIGN = {
    "llama": (llama, 0, False, "plain"),
    "gpt2": (gpt2, 1, False, "plain"),
    "bert": (bert, 1, True, "masked"),
    "mamba": (mamba, 0, False, "plain"),
    "no mask": (lambda: (NoMask(), bert()[1]), 1, True, "none"),
}


def foreign_encoder(name, **options):
    make, before, both_sides, _ = FOREIGN[name]
    model, tokenizer = make()
    model = getattr(model, "base_model", model)
    encoder = SequenceEncoder(LoadedModel(model, tokenizer), **options)
    return encoder, {"before": before, "both_sides": both_sides}


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_batches_equal_one_by_one_on_both_strands(tiny_folder, layer):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    assert (encoder.layers, encoder.context) == (5, 48)
    found = encoder.embed(SEQUENCES, [(layer, pooling) for pooling in POOLINGS])
    model = GengramModel.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    for pooling in POOLINGS:
        vectors = [strand_vectors(model, GengramTokenizer(), text, "both", layer, 48, 24) for text in SEQUENCES]
        expected = [np.concatenate([pooled(strand, pooling) for strand in strands]) for strands in vectors]
        np.testing.assert_allclose(found[layer, pooling], expected, atol=SAME_HIDDEN_STATES_FP32)
        assert found[layer, pooling].dtype == np.float32
    forward = encoder.embed(SEQUENCES, [(layer, "mean")], both_strands=False)[layer, "mean"]
    np.testing.assert_allclose(forward, found[layer, "mean"][:, :32], atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("strands", ["both", "forward", "reverse"])
@pytest.mark.parametrize("pooling", [*POOLINGS, "none"])
def test_other_models_equal_brute_force_whatever_they_are(name, strands, pooling):
    encoder, nature = foreign_encoder(name, context=20, overlap=7, batch_tokens=90)
    sequences = random_sequences(12, 70)
    found = encoder.vectors(sequences, layer=1, pooling=pooling, strands=strands)
    for own, sequence in zip(found, sequences, strict=True):
        expected = embedding(encoder.model, encoder.tokenizer, sequence, pooling, strands, 1, 20, 7, **nature)
        np.testing.assert_allclose(own, expected, atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_models_nature_is_found_by_trial(name):
    encoder, nature = foreign_encoder(name)
    states = HiddenStates(LoadedModel(encoder.model, encoder.tokenizer), BaseTokens.of(encoder.tokenizer))
    assert (states.sees_both_sides, states.padding) == (nature["both_sides"], FOREIGN[name][3])
    assert states.layers == 3


def test_a_pad_that_the_model_does_not_know_is_not_read():
    model, tokenizer = bert()
    tokens = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<{number}>" for number in range(tokens)])
    tokenizer.add_special_tokens({"pad_token": "[FAR]"})
    assert tokenizer.pad_token_id >= tokens
    encoder = SequenceEncoder(LoadedModel(model.base_model, tokenizer))
    alone = np.concatenate([encoder.vectors([sequence]) for sequence in SEQUENCES])
    np.testing.assert_allclose(encoder.vectors(SEQUENCES), alone, rtol=0, atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("pooling", [*POOLINGS, "none"])
def test_values_depend_neither_on_batches_nor_on_order(tiny_folder, pooling):
    sequences = random_sequences(30, 150)
    order = random.Random(1).sample(range(30), 30)
    one = SequenceEncoder(str(tiny_folder), device="cpu", batch_tokens=1).vectors(sequences, pooling=pooling)
    all_at_once = SequenceEncoder(str(tiny_folder), device="cpu", batch_tokens=10**6)
    shuffled = all_at_once.vectors([sequences[row] for row in order], pooling=pooling)
    for place, row in enumerate(order):
        np.testing.assert_allclose(shuffled[place], one[row], atol=SAME_HIDDEN_STATES_FP32)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_both_strands_of_a_sequence_and_of_its_complement_are_one(tiny_folder, pooling):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    sequences = random_sequences(10, 200)
    turned = encoder.vectors(list(map(reverse_complement, sequences)), pooling=pooling)
    np.testing.assert_allclose(encoder.vectors(sequences, pooling=pooling), turned, atol=SAME_HIDDEN_STATES_FP32)
    onwards = encoder.vectors(list(map(reverse_complement, sequences)), pooling=pooling, strands="forward")
    backwards = encoder.vectors(sequences, pooling=pooling, strands="reverse")
    np.testing.assert_allclose(onwards, backwards, atol=SAME_HIDDEN_STATES_FP32)


def test_a_stream_of_sequences_gives_a_stream_of_vectors(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu", batch_tokens=4)
    sequences = random_sequences(20, 100)
    asked_for = []

    def stream():
        for number, sequence in enumerate(sequences):
            asked_for.append(number)
            yield sequence

    found = embed_sequences(stream(), encoder, pooling="max")
    first = next(found)
    assert len(asked_for) < len(sequences)
    expected = encoder.vectors(sequences, pooling="max")
    np.testing.assert_allclose([first, *found], expected, atol=SAME_HIDDEN_STATES_FP32)
    assert list(embed_sequences([], encoder)) == []


def test_without_sequences_there_are_no_vectors(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    assert len(encoder.vectors([])) == len(encoder.vectors([], pooling="none")) == 0


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", r"sequence 1: expected bases, got an empty sequence, which has no embedding"),
        ("AC-GT", r"sequence 1: expected DNA .* got '-' at base 3; remove the gaps"),
        ("MKLV", r"got 'L' at base 3"),
        ("ACGé", r"got 'é' at base 4"),
        ("AC GT", r"got ' ' at base 3"),
    ],
)
def test_what_is_no_dna_is_refused(tiny_folder, sequence, message):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    with pytest.raises(InputError, match=message):
        encoder.vectors(["ACGT", sequence])


def test_wrong_arguments_are_refused(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    for layer in (5, -6):
        with pytest.raises(ValueError, match=rf"layer in 0\.\.4 \(0 is the embedding; -1 is the last\), got {layer}"):
            encoder.embed(["A"], [(layer, "mean")])
    with pytest.raises(ValueError, match="expected a pooling of mean, max, last, centre, got 'median'"):
        encoder.embed(["A"], [(0, "median")])
    with pytest.raises(ValueError, match="strands: expected both, forward, reverse, got '-'"):
        encoder.vectors(["A"], strands="-")
    for context in (0, 49):
        with pytest.raises(ValueError, match=f"a context of 1 to 48 bases, as the model reads at once, got {context}"):
            SequenceEncoder(str(tiny_folder), device="cpu", context=context)
    with pytest.raises(ValueError, match="an overlap of 0 to 9"):
        SequenceEncoder(str(tiny_folder), device="cpu", context=10, overlap=10)


def test_a_model_without_hidden_states_is_refused():
    class Outputs:
        logits = torch.zeros(1, 1, 1)

    class NoStates(NoMask):
        def forward(self, input_ids, output_hidden_states=None):
            return Outputs()

    with pytest.raises(ValueError, match="expected a model that gives hidden states, got NoStates"):
        SequenceEncoder(LoadedModel(NoStates(), foreign_tokenizer()))


def test_a_model_of_encoder_and_decoder_is_refused():
    model = NoMask()
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="expected an encoder or a decoder, got NoMask, which is both"):
        SequenceEncoder(LoadedModel(model, foreign_tokenizer()))


def test_the_last_layer_is_the_models_last_hidden_state(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu")
    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**GengramTokenizer()(SEQUENCES[0], return_tensors="pt")).last_hidden_state[0].numpy()
    for layer in (-1, 4):
        (found,) = encoder.vectors(SEQUENCES[:1], layer=layer, pooling="none", strands="forward")
        np.testing.assert_allclose(found, expected, atol=SAME_HIDDEN_STATES_FP32)


def test_half_precision_is_pooled_in_float32(tiny_folder):
    encoder = SequenceEncoder(str(tiny_folder), device="cpu", dtype=torch.bfloat16)
    (each,) = encoder.vectors(SEQUENCES[2:3], pooling="none", strands="forward")
    assert torch.equal(torch.from_numpy(each).bfloat16().float(), torch.from_numpy(each))  # the model's own numbers
    (mean,) = encoder.vectors(SEQUENCES[2:3], strands="forward")
    np.testing.assert_allclose(mean, each.astype(np.float64).mean(0), atol=SAME_HIDDEN_STATES_FP32)


def test_tokens_of_several_bases_can_be_pooled_but_not_placed():
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "A", "C", "G", "T", "N", "AC", "GT"])}
    backend = Tokenizer(models.BPE(vocabulary, [("A", "C"), ("G", "T")], unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_max_length=8)
    model, _ = llama()
    encoder = SequenceEncoder(LoadedModel(model.base_model, tokenizer))
    text = "ACGTTACACGGTACGTAGTC"
    ids = tokenizer(text)["input_ids"]
    assert 8 < len(ids) < len(text)
    (found,) = encoder.embed([text], [(2, "mean")], both_strands=False).values()
    vectors = []
    for place, (start, end) in enumerate(best_windows(len(ids), 8, 4, both_sides=False)):
        with torch.no_grad():
            states = model.base_model(torch.tensor([ids[start:end]])).last_hidden_state[0]
        vectors.append(states[place - start].numpy())
    np.testing.assert_allclose(found[0], np.mean(vectors, axis=0), atol=SAME_HIDDEN_STATES_FP32)
    with pytest.raises(ValueError, match="one token per base"):
        encoder.vectors([text])
