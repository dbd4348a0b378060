"""What clients may ask for, and which values are allowed."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..generation import Sampling

Strands = Literal["both", "forward", "reverse"]
Sequences = str | Annotated[list[str], Field(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")  # an option that is not known would be left out without a word
    not_here: ClassVar[tuple[str, ...]] = ()  # options of OpenAI's that this server lacks; they may be null

    model: str | None = None  # there is one; clients of OpenAI name it all the same
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """What is null is not given, as with OpenAI, whose clients send some options so."""
        if not isinstance(given, dict):
            return given
        known = {*cls.model_fields, *cls.not_here}
        return {name: value for name, value in given.items() if value is not None or name not in known}


class CompletionRequest(_Request):
    """`/v1/completions`: bases behind prompts."""

    not_here = (
        *("best_of", "frequency_penalty", "logit_bias", "logprobs", "presence_penalty"),
        *("stop", "stream_options", "suffix"),
    )

    prompt: Sequences = ""
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=4, ge=1, le=4)
    n: int = Field(default=1, ge=1)
    seed: int | None = Field(default=None, ge=0)
    echo: bool = False
    stream: Literal[False] = False

    @property
    def sampling(self) -> Sampling:
        """How bases are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p)


class EmbeddingRequest(_Request):
    """`/v1/embeddings`: a vector of each sequence."""

    not_here = ("dimensions",)

    input: Sequences
    encoding_format: Literal["float", "base64"] = "float"
    layer: int = -1
    pooling: Literal["mean", "max", "last", "centre"] = "mean"
    strands: Strands = "both"


class Windows(BaseModel):
    """Two windows of one length that hold two alleles."""

    model_config = ConfigDict(extra="forbid")

    reference: str
    alternative: str


class ScoreRequest(_Request):
    """`/v1/score`: log-likelihood ratios of variants, given as windows."""

    variants: Annotated[list[Windows], Field(min_length=1)]
    strands: Strands = "both"


def listed(sequences: str | list[str]) -> list[str]:
    """One or several sequences, as a list."""
    return [sequences] if isinstance(sequences, str) else sequences
