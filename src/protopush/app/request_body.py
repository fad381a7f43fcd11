"""Body of a request, read into files that are small in memory: one image, or several; or a refusal with its reason."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from tempfile import SpooledTemporaryFile

import anyio
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

IN_MEMORY = 1 << 20  # bytes of a file; what is more lies on the disk
NAME = "image"  # of an image that comes without one
ACCEPTED = "an image as the body (Content-Type image/jpeg, image/png, ...) or multipart/form-data with image files"


class Refusal(Exception):
    """Why a request is not answered: a status, and a line that says the fact and what was expected."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, dict(headers or {})


async def read_files(request: Request, megabytes: float, seconds: float, most: int) -> list[UploadFile]:
    """The files of a body of at most so many megabytes, seconds and files; whoever asks closes them.

    Raises:
        Refusal: it is too large, too slow, of another kind, or broken.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Refusal(415, f"the body is encoded ({encoding[:20]}); expected it as it is, without Content-Encoding")
    if kind != "multipart/form-data" and not kind.startswith("image/"):
        raise Refusal(415, f"Content-Type is {kind[:100] or 'missing'}; expected {ACCEPTED}")
    body = _bounded(request, megabytes)
    try:
        with anyio.fail_after(seconds):
            return await (_parts(request, body, most) if kind.startswith("multipart") else _whole(body))
    except TimeoutError as error:
        raise Refusal(408, f"the body was not there after {seconds:g} s; expected it in that time") from error
    except OSError as error:  # the disk is full
        raise Refusal(503, "there is no room for the body; expected fewer at once", {"Retry-After": "10"}) from error


async def _bounded(request: Request, megabytes: float) -> AsyncGenerator[bytes, None]:
    most, size = int(megabytes * 1e6), 0
    too_large = Refusal(413, f"the body is larger than {megabytes:g} MB; expected at most that")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        yield chunk


async def _whole(body: AsyncGenerator[bytes, None]) -> list[UploadFile]:
    spooled = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - whoever asks closes it
    file = UploadFile(spooled, filename=NAME)  # type: ignore[arg-type]
    try:
        async for chunk in body:
            await file.write(chunk)
    except BaseException:
        await file.close()
        raise
    return [file]


async def _parts(request: Request, body: AsyncGenerator[bytes, None], most: int) -> list[UploadFile]:
    expected = f"expected 1 to {most} image files" if most > 1 else "expected one image file"
    try:
        form = await MultiPartParser(request.headers, body, max_files=most, max_fields=0).parse()
    except MultiPartException as error:
        raise Refusal(422, f"the multipart body can't be read ({error.message.rstrip('.')}); {expected}") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise Refusal(422, f"the multipart body has no files; {expected}")
    return files


def file_name(file: UploadFile) -> str:
    """What a client calls a file, without its folders; of any length and kind of characters."""
    return re.split(r"[\\/]", file.filename or "")[-1][:200] or NAME
