"""Schemas of the HTTP interface.

Requests are validated with them. Responses are written straight from arrays; their schemas document
them, and tests validate every response.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dropserve.app.inference.query import SEED_LIMIT, MasksQuery, PredictQuery, Query
from dropserve.app.uncertainty.masks import Kind

Matrix = list[list[float]]  # [B, C]
Column = list[float]  # [B]

EXAMPLE_INPUTS = [[0.0] * 64]


class Document(BaseModel):
    """A JSON object without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PredictRequest(Document):
    """Rows to predict."""

    inputs: Annotated[
        list[object],
        Field(
            description="Rows of raw features: lists of numbers, flat or nested to the input's "
            "shape.",
            json_schema_extra={
                "items": {"type": "array", "items": {}},
                "minItems": 1,
                "examples": [EXAMPLE_INPUTS],
            },
        ),
    ]
    model: str | None = Field(None, description="Needed where several models are served.")
    version: int | None = Field(None, ge=1, description="The newest by default.")

    def predict_query(self) -> PredictQuery:
        """Return the query, free of its HTTP origin."""
        return PredictQuery(self.inputs, self.model, self.version)


class UncertaintyRequest(PredictRequest):
    """Rows to run train-mode passes of."""

    passes: int = Field(Query.passes, ge=1, description="Passes of each row.")
    seed: int | None = Field(
        Query.seed,
        ge=0,
        lt=SEED_LIMIT,
        description="Seed of the masks; drawn and returned if not given.",
    )
    interval: float = Field(
        Query.interval,
        gt=0,
        lt=1,
        description="Share of the passes, or of the predicted values, that lies in the interval.",
    )
    masks: Kind = Field(
        Query.masks,
        description="How masks are drawn. Stratified: for some ten passes together, each unit is "
        "kept in exactly its share of them; the same mean with fewer passes.",
    )
    tolerance: float | None = Field(
        Query.tolerance,
        gt=0,
        lt=float("inf"),
        description="Stop drawing passes once all standard errors are as small; passes is the "
        "most.",
    )
    coverage: float | None = Field(
        Query.coverage,
        gt=0,
        lt=1,
        description="Also return a split-conformal set or interval that contains the truth with "
        "this probability.",
    )

    def query(self) -> Query:
        """Return the query, free of its HTTP origin."""
        return Query(
            inputs=self.inputs,
            model=self.model,
            version=self.version,
            passes=self.passes,
            seed=self.seed,
            interval=self.interval,
            masks=self.masks,
            tolerance=self.tolerance,
            coverage=self.coverage,
        )


class MasksRequest(Document):
    """The request whose masks the console shows."""

    model: str
    version: int = Field(ge=1)
    passes: int = Field(ge=1)
    seed: int = Field(ge=0, lt=SEED_LIMIT)
    masks: Kind

    def query(self) -> MasksQuery:
        """Return the query, free of its HTTP origin."""
        return MasksQuery(self.model, self.version, self.passes, self.seed, self.masks)


class ClassPrediction(Document):
    """Eval-mode answer of a classification model."""

    model: str
    version: int
    labels: list[str]
    probabilities: Matrix


class ValuePrediction(Document):
    """Eval-mode answer of a regression model."""

    model: str
    version: int
    values: Matrix


class Interval(Document):
    """Quantiles of the passes, or of the predicted values."""

    level: float
    lower: Matrix
    upper: Matrix


class PredictionInterval(Document):
    """Interval that contains the truth with a probability of at least ``coverage``, over rows."""

    coverage: float
    lower: Matrix
    upper: Matrix


class Uncertainty(Document):
    """Statistics of the passes, which all Monte Carlo answers share."""

    model: str
    version: int
    passes: int = Field(description="With a tolerance, as many as it took.")
    seed: int
    mean: Matrix
    std: Matrix = Field(description="Of the passes, divisor passes - 1.")
    standard_error: Matrix | None = Field(
        description="Of the mean: std / sqrt(passes), or what the replicates of stratified masks "
        "tell. Null for a single pass, which cannot tell."
    )
    interval: Interval
    converged: bool | None = Field(
        description="Whether all standard errors are within the tolerance. Null without one."
    )


class ClassUncertainty(Uncertainty):
    """Monte Carlo answer of a classification model; entropies in nats."""

    labels: list[str] = Field(description="Of the mean.")
    predictive_entropy: Column = Field(description="Entropy of the mean: all the uncertainty.")
    expected_entropy: Column = Field(description="Mean entropy of the passes: the data's part.")
    mutual_information: Column = Field(description="Their difference: the model's part.")
    variation_ratio: Column = Field(description="Share of passes that name another class.")
    prediction_set: list[list[str]] | None = Field(
        None,
        description="With coverage: for each row a set of labels that contains the truth with at "
        "least that probability over rows.",
    )


class ValueUncertainty(Uncertainty):
    """Monte Carlo answer of a regression model, in the target's units."""

    epistemic_std: Matrix = Field(description="The model's part: std of the passes.")
    aleatoric_std: Matrix = Field(description="The data's part: noise fitted when training.")
    total_std: Matrix
    prediction_interval: PredictionInterval | None = Field(None, description="With coverage.")


class SiteReport(Document):
    """A dropout site, and the share of its units that the masks of this answer kept."""

    name: str
    p: float
    scaling: str
    kept: float


class Passes(Document):
    """The passes themselves, which a debug answer adds."""

    samples: list[Matrix] = Field(description="[passes, rows, outputs]")
    deterministic: Matrix = Field(description="Eval mode.")
    expectation_gap: Matrix | None = Field(
        description="(mean - deterministic) / standard error: about 1 in size where the passes "
        "scatter around eval mode. Null for a single pass."
    )
    sites: list[SiteReport]


class ClassDebug(Passes, ClassUncertainty):
    """Passes of a classification model."""


class ValueDebug(Passes, ValueUncertainty):
    """Passes of a regression model."""


class Alive(Document):
    """The process answers."""

    status: Literal["alive"]


class Ready(Document):
    """The service takes requests."""

    status: Literal["ready"]
    device: str
    provider: str = Field(description="The onnxruntime provider that runs the graphs.")
    models: dict[str, list[int]] = Field(description="The versions of each model.")


class TensorDescription(Document):
    """An input or output tensor of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1: as many as there are rows.")


class ServerDescription(Document):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class ModelDescription(Document):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDescription]
    outputs: list[TensorDescription]


class ModelReadiness(Document):
    """A model is served."""

    name: str
    ready: bool


class ConfiguredTensor(Document):
    """An input or output tensor in a model's configuration."""

    name: str
    data_type: str
    dims: list[int] = Field(description="Without the batch axis.")


class ModelConfiguration(Document):
    """The configuration of a model, as Triton has it."""

    name: str
    platform: str
    backend: str
    version_policy: dict[str, dict[str, int]] = Field(description="All versions are served.")
    max_batch_size: int = Field(description="Most rows of a request.")
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: dict[str, int] = Field(description="Requests share runs.")


class Statistic(Document):
    """Number of requests, and the time that they took together."""

    count: int
    ns: int


class InferenceStatistics(Document):
    """What requests took; all but ``fail`` are of those that succeeded."""

    success: Statistic
    fail: Statistic
    queue: Statistic = Field(description="Waiting for runs.")
    compute_input: Statistic = Field(description="Counted as part of compute_infer.")
    compute_infer: Statistic = Field(description="In runs; a shared run counts in full.")
    compute_output: Statistic = Field(description="Counted as part of compute_infer.")


class VersionStatistics(Document):
    """Statistics of a version of a model, as Triton has them."""

    name: str
    version: str
    inference_count: int = Field(description="Rows answered.")
    execution_count: int = Field(description="Runs of the graph.")
    inference_stats: InferenceStatistics
    batch_stats: list[object] = Field(description="Empty: times are not kept by size.")


class ModelStatistics(Document):
    """Statistics of models, as Triton has them."""

    model_stats: list[VersionStatistics]


class PredictionRequest(Document):
    """A request of KServe's first protocol."""

    instances: Annotated[
        list[object],
        Field(
            description="Rows, as `inputs` of /predict.",
            json_schema_extra={"items": {"type": "array", "items": {}}, "minItems": 1},
        ),
    ]
    signature_name: str | None = Field(None, description="Ignored: a model has one.")


class PredictionAnswer(Document):
    """An answer of KServe's first protocol."""

    predictions: Matrix = Field(description="Class probabilities or values of each row.")


class ModelList(Document):
    """The served models."""

    models: list[str]


class Live(Document):
    """The server answers."""

    live: bool


class Readiness(Document):
    """The server takes requests."""

    ready: bool


class VersionState(Document):
    """Status of a version in the model repository."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class GoesOn(Document):
    """A change of the served models that goes on."""

    error: str = Field(description="What goes on, in the field that Triton's clients show.")


class IndexRequest(Document):
    """Filter of the listed versions."""

    ready: bool = Field(False, description="Only served versions.")


class LoadRequest(Document):
    """Body of a request to load or unload the model in its path."""

    parameters: dict[str, object] = Field(
        {}, description="None is understood; unload_dependents is ignored."
    )


class ProtocolError(Document):
    """An error as the Open Inference Protocol has it."""

    error: str


class InferTensor(Document):
    """An input of the Open Inference Protocol."""

    name: str
    shape: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=2, description="As the model describes its input, the rows first."
    )
    datatype: Literal[
        "FP32",
        "FP64",
        "FP16",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
    ] = Field(description="Values are converted to FP32.")
    parameters: dict[str, object] = {}
    data: list[object] | None = Field(
        None, description="Flat or nested; none if binary data follows the JSON."
    )


class InferOutput(Document):
    """A requested output."""

    name: str
    parameters: dict[str, object] = {}


class InferDocument(Document):
    """A request of the Open Inference Protocol."""

    id: str | None = None
    model_name: str | None = Field(None, description="If given, as in the path.")
    model_version: str | None = Field(None, description="If given, the one that answers.")
    parameters: dict[str, object] = Field(
        {},
        description="binary_data_output; timeout in microseconds; for NAME.mc passes, seed, masks, "
        "tolerance, interval and coverage. Hints of other servers' clients are ignored.",
    )
    inputs: list[InferTensor] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(None, description="All by default.")


class AnsweredTensor(Document):
    """An output of the Open Inference Protocol."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, object] = {}
    data: list[float] | list[str] | list[bool] | None = None


class InferAnswer(Document):
    """An answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, object] = {}
    outputs: list[AnsweredTensor]


class FieldProblem(Document):
    """One thing that is wrong with a body."""

    path: str = Field(description="Where in the body, like inputs.0.3.")
    message: str


class Problem(Document):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldProblem] | None = None
