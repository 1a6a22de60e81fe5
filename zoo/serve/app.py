"""The server as an ASGI application: the gate, the API behind it, and the page that uses the API."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException

from zoo.images import ImageError
from zoo.serve.api import add_routes
from zoo.serve.gate import Gate
from zoo.serve.limits import Limits
from zoo.serve.models import Models
from zoo.serve.page import mount_page
from zoo.serve.work import Workers

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def create_app(
    models: Models, limits: Limits | None = None, token: str = "", hosts: Iterable[str] | None = LOOPBACK
) -> FastAPI:
    """The page and the API of some models.

    While the server runs, ``PIL.Image.MAX_IMAGE_PIXELS`` is the limit on pixels.

    Args:
        models: what to serve.
        limits: how much to take on.
        token: what requests must bring; empty for nothing.
        hosts: the names in the address bar under which the server answers; None for any. The default keeps pages of
            other sites from reaching a server on this machine.
    """
    limits = limits or Limits()
    workers = Workers(limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limits.pixels
        yield
        workers.close()
        Image.MAX_IMAGE_PIXELS = before

    app = FastAPIOffline(
        title="linear-vision-zoo",
        summary="Names, boxes, maps and words for pictures.",
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, limits=limits, token=token, hosts=hosts)
    app.exception_handlers |= {
        ImageError: _bad_picture,
        RequestValidationError: _bad_fields,
        StarletteHTTPException: _refused,
    }
    add_routes(app, models, limits, workers)
    samples = {path.name: path for path in (files("zoo") / "samples").iterdir() if path.name.endswith(".jpg")}

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> FileResponse:
        if name not in samples:
            raise HTTPException(404, "There is no such sample.")
        return FileResponse(str(samples[name]), media_type="image/jpeg")

    return mount_page(app, models, sorted(name.removesuffix(".jpg") for name in samples))


async def _bad_picture(request: Request, error: ImageError) -> JSONResponse:
    return JSONResponse({"error": f"The picture {error.reason}"}, 422)


async def _bad_fields(request: Request, error: RequestValidationError) -> JSONResponse:
    faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'the body'}: {fault['msg']}" for fault in error.errors()]
    return JSONResponse({"error": f"{'; '.join(faults)}."}, 422)


async def _refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)
