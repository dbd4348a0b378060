import types

import numpy as np
import pytest

from gengram.evaluation.evaluated_model import EvaluatedModel
from gengram.support.errors import InputError


def test_embeddings_that_are_not_finite_are_refused_before_a_classifier_sees_them():
    """Boosted trees would take nan for a value that is missing."""
    model = EvaluatedModel("any")
    vectors = np.array([[0, 1], [np.nan, 0], [np.inf, np.nan]])
    model.__dict__["encoder"] = types.SimpleNamespace(embed=lambda *arguments: {(3, "mean"): vectors})
    with pytest.raises(InputError, match="got nan or infinity in layer 3 for 2 of 3 sequences"):
        model.embed(["A", "C", "G"], [(3, "mean")], both_strands=True, progress=False)
