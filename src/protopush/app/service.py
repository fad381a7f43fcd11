"""Service: predictions and explanations of a run over HTTP. What it computes is the library's; here is who may ask."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from protopush import __version__
from protopush.api import Run
from protopush.app import answers
from protopush.app.answers import Health, Prediction, Predictions, Version
from protopush.app.batching import Batcher, Full, Seen
from protopush.app.request_body import ACCEPTED, Refusal, file_name, read_files
from protopush.app.service_page import page_of
from protopush.app.upload import Limits, read_upload
from protopush.data.files import read_json
from protopush.data.transforms import View
from protopush.errors import Count, InputError, Range, listing
from protopush.explain import draw_panel, draw_why_not
from protopush.explain.explanation import explain_output
from protopush.models.stored_run import current_versions
from protopush.predict.inputs import read_output

FILES = 32  # images of a request
ERRORS = {
    401: "no token, or a wrong one", 403: "called by a name that the service does not have",
    408: "the body came too slowly", 413: "the body is too large", 415: "the body is no image",
    422: "an image or an option can't be read",
    503: "too many requests at once; Retry-After says when to try again",
}  # fmt: skip
BINARY = {"type": "string", "format": "binary"}
T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """How much at once, and how long.

    Attributes:
        upload: of a body, and of an image in it.
        max_batch: images of a forward pass.
        max_wait_ms: that an image waits for others that are on their way.
        body_seconds: until the whole body of a request must be there.
        requests: at once, whose bodies are read or that wait for the model; more are refused.
        grace: seconds that requests in flight have when the service ends.
    """

    upload: Limits = field(default_factory=Limits)
    max_batch: Count = 16
    max_wait_ms: Annotated[float, Range(0, 1000)] = 5.0
    body_seconds: float = 60.0
    requests: Count = 128
    grace: float = 30.0


@dataclass(frozen=True)
class Picture:
    """An image that waits, (3, H, W); what a panel is drawn on is read again from its file, as it would take memory."""

    name: str
    pixels: Tensor
    view: View
    note: str
    file: UploadFile


class Asked(BaseModel):
    """What an explanation is to hold."""

    model_config = ConfigDict(extra="forbid")
    top_classes: int = Field(3, ge=1, description="how many of the most probable classes")
    why_not: str | None = Field(None, description="another class, whose evidence stands beside the predicted one's")
    panel: Literal["png"] | None = Field(None, description="answer with the picture, as Accept: image/png does")


class Service:
    """The endpoints of a run, whose model has a thread; others decode images and draw.

    Attributes:
        stopping: set when the service ends; it then says that it isn't ready.
        answered, cut: requests that had their whole answer, and that were cut off when the service ended.
    """

    def __init__(self, run: Run, limits: ServiceLimits, threshold: float | None = None) -> None:
        self.run, self.limits, self.threshold = run, limits, threshold
        self.stopping, self.requests, self.answered, self.cut = False, 0, 0, 0
        config = read_json(run.folder / "config.json")
        self.about = Version(
            versions=current_versions(),
            weights_sha256=config["weights_sha256"],
            device=run.device.type,
            classes=run.class_names,
            prior=config.get("prior"),
            preprocessing=run.transform.preprocessing.to_dict(),
            crop_pct=run.transform.crop_pct,
            threshold=threshold,
        )
        most = max(2 * limits.max_batch, 4 * FILES)
        self.batcher = Batcher(run.model, run.device, limits.max_batch, limits.max_wait_ms / 1000, most)
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")

    def close(self) -> bool:
        """End the threads; whether they have ended."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        return self.batcher.close(patience=0.0 if self.cut else 10.0)

    async def health(self, response: Response) -> Health:
        """Whether the service answers: 200, or 503 while it ends and after a forward pass that failed."""
        ready = self.batcher.ready and not self.stopping
        response.status_code = 200 if ready else 503
        return Health(ready=ready)

    async def version(self) -> Version:
        """Versions, the hash of the weights, the classes, and what probabilities and thresholds assume."""
        return self.about

    async def predict(self, request: Request) -> Predictions:
        """Classes and probabilities of one or several images."""

        async def finish(picture: Picture, seen: Seen) -> Prediction:
            return self._prediction(picture, seen)

        return Predictions(predictions=await self._answer(request, FILES, finish))

    async def explain(self, request: Request, asked: Annotated[Asked, Query()]) -> Response:
        """Why the model says what it says of one image: every term of its logits, as JSON or as a panel (PNG)."""
        names = self.run.class_names
        if asked.why_not is not None and asked.why_not not in names:
            raise Refusal(422, f"unknown class {asked.why_not!r} in why_not; expected one of: {listing(names)}")
        drawn = asked.panel == "png" or "image/png" in request.headers.get("accept", "")

        async def finish(picture: Picture, seen: Seen) -> Response:
            return await self._in_pool(self._explanation, picture, seen, asked, drawn)

        return (await self._answer(request, 1, finish))[0]

    async def _answer(self, request: Request, most: int, finish: Callable[[Picture, Seen], Awaitable[T]]) -> list[T]:
        """What ``finish`` makes of each image of a request; all of them, or a refusal."""
        busy = Refusal(503, "too many requests at once; expected fewer, or the same again later", {"Retry-After": "1"})
        if self.requests >= self.limits.requests:
            raise busy
        self.requests += 1
        files = list[UploadFile]()
        try:
            upload = self.limits.upload
            files = await read_files(request, upload.megabytes, self.limits.body_seconds, most)
            with self.batcher.reserve(len(files)):
                # Each is waited for, so that no file is closed under a thread that reads it.
                found = await asyncio.gather(*(self._one(file, finish) for file in files), return_exceptions=True)
        except Full as error:
            raise busy from error
        finally:
            self.requests -= 1
            for file in files:
                file.file.close()
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return found  # type: ignore[return-value]

    async def _one(self, file: UploadFile, finish: Callable[[Picture, Seen], Awaitable[T]]) -> T:
        try:
            picture = await self._in_pool(self._decode, file)
        except InputError as error:
            raise Refusal(422, str(error)) from error
        seen = await asyncio.wrap_future(self.batcher.submit(picture.pixels))
        if not seen.output.logits.isfinite().all():
            raise Refusal(500, "the model's logits are not finite; expected numbers; the run is damaged")
        return await finish(picture, seen)

    def _in_pool(self, call: Callable[..., T], *words: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self.pool, call, *words)

    def _decode(self, file: UploadFile) -> Picture:
        upload = read_upload(file.file, self.limits.upload, file_name(file))
        view = self.run.transform.view(upload.image.size)
        return Picture(upload.name, self.run.transform(upload.image), view, upload.note, file)

    def _prediction(self, picture: Picture, seen: Seen) -> Prediction:
        outputs = read_output(seen.output, self.run.head.proto_manager.mask(), 0)
        predicted, best, names = int(outputs.predicted[0]), float(outputs.best[0]), self.run.class_names
        return Prediction(
            file=picture.name,
            predicted=names[predicted],
            probability=outputs.probabilities[0, predicted],
            probabilities=dict(zip(names, outputs.probabilities[0].tolist(), strict=True)),
            best_similarity=best,
            nothing_similar=None if self.threshold is None else best < self.threshold,
            note=picture.note,
        )

    def _explanation(self, picture: Picture, seen: Seen, asked: Asked, drawn: bool) -> Response:
        also = [asked.why_not] if asked.why_not is not None else []
        (found,) = explain_output(
            self.run.head, seen.output, seen.regions, [picture.view], [picture.name], self.run.class_names,
            asked.top_classes, also,
        )  # fmt: skip
        if not drawn:
            values = answers.explanation_values(found, asked.why_not)
            return Response(json.dumps(values, allow_nan=False), media_type="application/json")
        if asked.why_not == found.predicted_name:
            raise Refusal(422, f"why_not {asked.why_not!r} is the predicted class; expected another one")
        copy, data = read_upload(picture.file.file, self.limits.upload, picture.name).copy(), io.BytesIO()
        if asked.why_not is None:
            panel = draw_panel(found, copy, self.run.source)
        else:
            panel = draw_why_not(found, asked.why_not, copy, self.run.source)
        panel.save(data, format="PNG")
        return Response(data.getvalue(), media_type="image/png")


def build_service(service: Service, with_token: bool = False, root_path: str = "") -> FastAPI:
    """The application behind the entrance.

    Args:
        with_token: whether the OpenAPI page says that callers have to know one.
        root_path: where a proxy shows the service, for the OpenAPI page.
    """
    app = FastAPI(
        title="protopush", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        servers=[{"url": root_path or "/"}],
        description="Predictions of a prototype classifier, and the training patches that they rest on.",
    )  # fmt: skip
    known = [Depends(HTTPBearer(auto_error=False))] if with_token else []
    errors: dict[int | str, Any] = {code: {"model": answers.Error, "description": why} for code, why in ERRORS.items()}
    unready: dict[int | str, Any] = {503: {"model": Health, "description": "not ready"}}
    app.add_api_route("/health", service.health, methods=["GET"], responses=unready, response_description="ready")
    closed: dict[str, Any] = {"dependencies": known, "response_description": "the answer"}
    app.add_api_route("/version", service.version, methods=["GET"], responses={401: errors[401]}, **closed)
    several = _body({"type": "array", "items": BINARY, "maxItems": FILES})
    app.add_api_route("/predict", service.predict, methods=["POST"], responses=errors, openapi_extra=several, **closed)
    picture = {"image/png": {"schema": BINARY}}
    explained = {"model": answers.ExplanationAnswer, "description": "JSON or PNG", "content": picture}
    app.add_api_route(
        "/explain", service.explain, methods=["POST"], responses=errors | {200: explained}, response_model=None,
        openapi_extra=_body(BINARY), **closed,
    )  # fmt: skip

    def docs(request: Request) -> HTMLResponse:
        shown = root_path if "://" in root_path else str(request.base_url).rstrip("/") + root_path
        return HTMLResponse(page_of(app.openapi(), shown))

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))  # which nobody reads
    app.add_exception_handler(RequestValidationError, _wrong_option)
    app.add_exception_handler(HTTPException, _nothing_there)
    app.add_exception_handler(Exception, lambda *_: refused(500, "the service failed; its log says why"))
    return app


def refused(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says why there is none."""
    return JSONResponse({"error": error}, status, headers)


def _body(files: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "object", "required": ["file"], "properties": {"file": files}}
    content = {"image/*": {"schema": BINARY}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "description": ACCEPTED, "content": content}}


def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error.status, error.error, error.headers)


def _wrong_option(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    option, value = first["loc"][-1], str(first.get("input"))[:100]
    return refused(422, f"{option} is {value!r}; {first['msg'][:1].lower()}{first['msg'][1:]}; /docs lists the options")


def _nothing_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return refused(405, f"{request.method} is not for this address; expected {allowed}", dict(error.headers or {}))
    return refused(error.status_code, "there is nothing at this address; expected one that /docs lists")
