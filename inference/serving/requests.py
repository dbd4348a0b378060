"""What clients may ask for, and which values are allowed."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..generation import Sampling

Strands = Literal["both", "forward", "reverse"]
Sequences = str | Annotated[list[str], Field(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")  # an option that is not known would be left out without a word

    model: str | None = None  # there is one; clients of OpenAI name it all the same
    user: str | None = None


class CompletionRequest(_Request):
    """`/v1/completions`: bases behind prompts."""

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
