import types

import foreign_models
import numpy as np
import pytest

from gengram.evaluation.evaluated_model import EvaluatedModel
from gengram.evaluation.suite import VariantTask
from gengram.evaluation.variants import LabelledVariants, zero_shot
from gengram.inference.effects import Change
from gengram.inference.window_effects import WindowEffects
from gengram.sequences.genome import genome_of
from gengram.sequences.variants import REASONS, Variant, variant_windows
from gengram.support.errors import InputError


def test_embeddings_that_are_not_finite_are_refused_before_a_classifier_sees_them():
    """Boosted trees would take nan for a value that is missing."""
    model = EvaluatedModel("any")
    vectors = np.array([[0, 1], [np.nan, 0], [np.inf, np.nan]])
    model.__dict__["encoder"] = types.SimpleNamespace(embed=lambda *arguments: {(3, "mean"): vectors})
    with pytest.raises(InputError, match="got nan or infinity in layer 3 for 2 of 3 sequences"):
        model.embed(["A", "C", "G"], [(3, "mean")], both_strands=True, progress=False)


def test_a_masked_model_has_no_likelihoods_and_scores_variants_as_one(tmp_path):
    for part in foreign_models.bert():
        part.save_pretrained(tmp_path)
    model = EvaluatedModel(str(tmp_path), "cpu")
    with pytest.raises(InputError, match="predicts masked bases from both sides, so it has no likelihoods"):
        _ = model.causal
    genome = genome_of({"g": "ACGT" * 20})
    rows = LabelledVariants(
        genome, [Variant("g", 8, "A", "C"), Variant("g", 8, "A", "AC")], np.array([1, 0]), {}, None, {}
    )
    scores, left_out = zero_shot(model, VariantTask("it", "variants.csv", "genome.fa", flank=10), rows, False)
    effects = WindowEffects(model.language_model.model, model.language_model.tokenizer, is_masked=True)
    (found,) = effects.of([Change(*variant_windows(genome, *rows.variants[0], 21))])
    assert scores[0] == -found.mean("llr") and np.isnan(scores[1])
    assert left_out == {REASONS["needs_causal_model"]: 1}
