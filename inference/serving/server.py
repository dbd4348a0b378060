"""The server's web application: OpenAI's completions and embeddings, scores of variants, health, counts and a page."""

import asyncio
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ...support.errors import shortened
from ..effects import StrandEffects
from ..memory_use import fast_memory
from .batching import Batcher, ClosedError, QueueFullError, Work
from .metrics import Metrics
from .requests import CompletionRequest, EmbeddingRequest, ScoreRequest, listed
from .served_model import EmbeddingChoice, ServedModel, as_base64, as_list

PAGE = Path(__file__).with_name("page.html")
_LOOK_AGAIN = 0.5  # seconds, for clients that have left
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


def names_of(address: str) -> list[str] | None:
    """What clients may call a server that listens at an IP address; None for anything if it is no loopback address."""
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return [*LOOPBACK, f"[{address}]" if ":" in address else address]


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Args:
        bases: of one sequence, new ones included.
        sequences: of one request.
        waiting: sequences of all requests that wait.
        body: bytes of a request.
    """

    bases: int = 16_384
    sequences: int = 256
    waiting: int = 1024
    body: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}.")


class _RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind


def serving_app(
    served: ServedModel, name: str, limits: Limits | None = None, hosts: Sequence[str] | None = LOOPBACK
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server. Its batches end when it shuts down.

    Args:
        served: the model.
        name: what it is called in answers.
        limits: of requests.
        hosts: what clients may call it; None for anything. Where only this machine reaches it, a web page could do so
            by the name of another host.
    """
    service = _Service(served, name, limits or Limits())

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncIterator[None]:
        with fast_memory(served.loaded.model):
            yield
            await asyncio.to_thread(service.batcher.close)

    app = FastAPI(title="Gengram", lifespan=lifetime, docs_url=None, redoc_url=None)  # those pages load foreign code
    app.add_middleware(_BodyLimit, most=service.limits.body)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(_Counted, metrics=service.metrics)
    app.exception_handler(_RefusedError)(_refusal)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_failure)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/embeddings")(service.embeddings)
    app.post("/v1/score")(service.score)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics_page)
    app.get("/", response_class=HTMLResponse)(service.page)
    return app


class _Service:
    """The answers to requests."""

    def __init__(self, served: ServedModel, name: str, limits: Limits):
        self.served, self.name, self.limits = served, name, limits
        self.started = int(time.time())
        self.batcher = Batcher(
            served.compute, limits.waiting, served.batch_tokens, lambda works: self.metrics.batches.observe(works)
        )
        self.metrics = Metrics(lambda: self.batcher.waiting)

    async def completions(self, request: CompletionRequest, client: Request) -> dict[str, Any]:
        """New bases behind each prompt, `n` times."""
        prompts = listed(request.prompt)
        self._check_size(prompts, len(prompts) * request.n, request.max_tokens)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        works: list[Work] = []
        for prompt in prompts:
            asked = (prompt, request.max_tokens, request.sampling, seed, request.n)
            works += _checked(self.served.continuations, *asked)
        found = await self._done(works, client)
        read, made = sum(map(len, prompts)), sum(map(len, found))
        self.metrics.bases.labels("/v1/completions").inc(read + made)
        if request.echo:
            found = [work.payload.prompt + bases for work, bases in zip(works, found, strict=True)]
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "seed": seed,
            "choices": [
                {"text": text, "index": index, "logprobs": None, "finish_reason": "length"}
                for index, text in enumerate(found)
            ],
            "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
        }

    async def embeddings(self, request: EmbeddingRequest, client: Request) -> dict[str, Any]:
        """A vector of each sequence."""
        sequences = listed(request.input)
        self._check_size(sequences, len(sequences))
        choice = EmbeddingChoice(request.layer, request.pooling, request.strands)
        works = [_checked(self.served.embedding, sequence, choice) for sequence in sequences]
        found = await self._done(works, client)
        if not all(np.isfinite(vector).all() for vector in found):
            raise _RefusedError(500, "the model gave NaN or infinity; try --dtype float32.", "server_error")
        read = sum(map(len, sequences))
        self.metrics.bases.labels("/v1/embeddings").inc(read)
        form: Callable[[Any], Any] = as_base64 if request.encoding_format == "base64" else as_list
        return {
            "object": "list",
            "model": self.name,
            "data": [
                {"object": "embedding", "index": index, "embedding": form(vector)}
                for index, vector in enumerate(found)
            ],
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }

    async def score(self, request: ScoreRequest, client: Request) -> dict[str, Any]:
        """log P(alternative window) - log P(reference window) of each variant, in nats, by strand and their mean."""
        windows = [text for variant in request.variants for text in (variant.reference, variant.alternative)]
        self._check_size(windows, len(request.variants))
        works = [
            _checked(self.served.effect, variant.reference, variant.alternative, request.strands)
            for variant in request.variants
        ]
        found: list[StrandEffects] = await self._done(works, client)
        read = sum(map(len, windows))
        self.metrics.bases.labels("/v1/score").inc(read)
        data = []
        for index, effects in enumerate(found):
            strands = {"llr_forward": effects.forward, "llr_reverse": effects.reverse}
            numbers = {key: None if effect is None else effect.llr for key, effect in strands.items()}
            data.append({"object": "score", "index": index, "llr": effects.mean("llr"), **numbers})
        return {
            "object": "list",
            "model": self.name,
            "data": data,
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }

    async def models(self) -> dict[str, Any]:
        """The one model that there is."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """What there is to say of the model."""
        if name != self.name:
            raise _RefusedError(404, f"expected the model {self.name!r}, which is served here, got {shortened(name)}.")
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "local"}

    async def health(self) -> dict[str, Any]:
        """That the server answers, and how many sequences wait."""
        return {"status": "ok", "model": self.name, "waiting": self.batcher.waiting}

    async def metrics_page(self) -> Response:
        """Counts, for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> str:
        """A page to try the model in a browser."""
        return PAGE.read_text(encoding="utf-8")

    def _check_size(self, sequences: Sequence[str], count: int, new: int = 0) -> None:
        most = min(self.limits.sequences, self.limits.waiting)
        if count > most:
            raise _RefusedError(400, f"expected at most {most} sequences in a request, got {count}.")
        longest = max(map(len, sequences)) + new
        if longest > self.limits.bases:
            words = ", new ones included" if new else ""
            raise _RefusedError(400, f"expected sequences of at most {self.limits.bases} bases{words}, got {longest}.")

    async def _done(self, works: Sequence[Work], client: Request) -> list[Any]:
        """The results of all works, which are given up if the client goes away."""
        try:
            self.batcher.submit(works)
        except QueueFullError as error:
            raise _RefusedError(429, f"too much work: {error}; try again later.", "rate_limit_error") from None
        except ClosedError:
            raise _RefusedError(503, "the server is shutting down.", "server_error") from None
        results = asyncio.gather(*(asyncio.wrap_future(work.future) for work in works))
        results.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # also if nobody awaits it
        leaving = asyncio.create_task(_has_left(client))
        try:
            either: list[asyncio.Future[Any]] = [results, leaving]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise _RefusedError(499, "the client has left.")  # nobody reads it; it is counted
            return list(await results)
        except ValueError as error:  # such as a model that gives NaN
            raise _RefusedError(500, str(error), "server_error") from error
        finally:
            results.cancel()
            leaving.cancel()
            for work in works:
                work.give_up()


async def _has_left(client: Request) -> None:
    """Return when the client has closed its connection."""
    while not await client.is_disconnected():
        await asyncio.sleep(_LOOK_AGAIN)


def _checked(make: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except ValueError as error:
        raise _RefusedError(400, str(error)) from None


def _error(status: int, message: str, kind: str, headers: Any = None) -> JSONResponse:
    """An error as OpenAI has it."""
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status_code=status, headers=headers)


async def _refusal(request: Request, error: Any) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return _error(error.status, str(error), error.kind, headers)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    words = "this server has no such option" if first["type"] == "extra_forbidden" else first["msg"]
    return _error(400, f"{place}: {words}.", "invalid_request_error")


async def _failure(request: Request, error: Any) -> JSONResponse:
    """The answer to a fault of ours, whose traceback is logged by the server that runs the application."""
    return _error(500, "the server failed; its log says why.", "server_error")


async def _http_error(request: Request, error: Any) -> JSONResponse:
    return _error(error.status_code, str(error.detail), "invalid_request_error", error.headers)


class _Counted:
    """Counts requests, and how long their answers took; says of those that are cut off that the server ends."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
            status = status or 499  # the client left while it sent its request
        except asyncio.CancelledError:  # uvicorn's, when the time to finish is over
            if status:
                raise
            await _error(503, "the server has ended.", "server_error")(scope, receive, watched)
        finally:
            path = route.path if (route := scope.get("route")) is not None else "other"
            self._metrics.requests.labels(path, str(status or 500)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)


class _BodyLimit:
    """Refuses bodies of more than `most` bytes, whatever their headers say, before they are in memory."""

    def __init__(self, app: Any, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"expected a request of at most {self._most:,} bytes; send fewer sequences at once."
        refusal = _error(413, message, "invalid_request_error", {"Connection": "close"})
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > self._most:
            await refusal(scope, receive, send)
            return
        parts, size = [], 0
        while True:
            message_part = await receive()
            if message_part["type"] != "http.request":
                return  # the client went away
            parts.append(message_part)
            size += len(message_part.get("body", b""))
            if size > self._most:
                await refusal(scope, receive, send)
                return
            if not message_part.get("more_body"):
                break

        async def replayed() -> Any:
            return parts.pop(0) if parts else await receive()

        await self._app(scope, replayed, send)
