"""The JSON API: each route takes a picture as a file of a form, never a path or a URL."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from threading import Event
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from zoo.catalogue import CATALOGUE
from zoo.serve import tasks
from zoo.serve.answers import Answer, Comparison, Detections, Error, Names, Overview, Segmentation
from zoo.serve.gate import DEADLINE
from zoo.serve.limits import Limits
from zoo.serve.models import LEAST_SCORE, Models
from zoo.serve.work import Workers

HASTE = 1.0  # seconds before its deadline at which an answer in words is ended

Served = TypeVar("Served")

Upload = Annotated[UploadFile, File(description="A picture, as a file.")]
Draw = Annotated[bool, Form(description="Also answer with a drawing.")]
TopK = Annotated[int, Form(ge=1, le=100, description="Names at most.")]
REFUSALS = {
    400: "The form is malformed.",
    401: "The token is missing or wrong.",
    408: "The upload is too slow.",
    413: "The request is too large.",
    422: "A field is wrong, or the picture cannot be read or has too many pixels.",
    501: "This server has no model for it.",
    503: "The queue is full; Retry-After says when to try again.",
    504: "The answer took too long.",
}

log = logging.getLogger(__name__)


def add_routes(app: FastAPI, models: Models, limits: Limits, workers: Workers) -> None:
    """Add the routes under /api to an app."""
    responses = {status: {"model": Error, "description": reason} for status, reason in REFUSALS.items()}
    # The gate has looked at the token; this is for the docs.
    router = APIRouter(prefix="/api", responses=responses, dependencies=[Depends(HTTPBearer(auto_error=False))])
    default = next(iter(models.classifiers))

    @router.get("/models")
    async def overview() -> Overview:
        """What is served, and within which limits."""
        return Overview(
            classifiers=list(models.classifiers),
            detect=models.detector is not None,
            segment=models.segmenter is not None,
            chat=models.chat and models.chat.name,
            missing=models.missing,
            limits=asdict(limits),
        )

    @router.post("/classify")
    async def classify(
        image: Upload, model: Annotated[str, Form(description="One of those served.")] = default, top_k: TopK = 5
    ) -> Names:
        """Name what is in a picture."""
        if model not in models.classifiers:
            raise HTTPException(422, f"There is no classifier {model!r} here, only {', '.join(models.classifiers)}.")
        classifier = models.classifiers[model]
        tensor = await workers.decode(tasks.loader(classifier), await image.read())
        return await workers.compute(tasks.classify, model, classifier, tensor, top_k)

    @router.post("/detect")
    async def detect(
        image: Upload,
        score: Annotated[float, Form(ge=LEAST_SCORE, le=1, description="The least.")] = 0.3,
        draw: Draw = False,
    ) -> Detections:
        """Find the things in a picture."""
        detector = _served(models, "detect", models.detector)
        loaded = await workers.decode(tasks.loader(detector), await image.read())
        return await workers.compute(tasks.detect, detector, loaded, score, draw)

    @router.post("/segment")
    async def segment(image: Upload, draw: Draw = False) -> Segmentation:
        """Name the class of every pixel."""
        segmenter = _served(models, "segment", models.segmenter)
        loaded = await workers.decode(tasks.loader(segmenter), await image.read())
        return await workers.compute(tasks.segment, segmenter, loaded, draw)

    @router.post("/compare")
    async def compare(
        image: Upload,
        first: Annotated[str, Form(description="A model of the zoo, or one of those served.")] = default,
        second: Annotated[str, Form(description="Another one.")] = default,
        top_k: TopK = 5,
    ) -> Comparison:
        """What is known of two models, and what they say of a picture if they are served."""
        for name in (first, second):
            if name not in CATALOGUE and name not in models.classifiers:
                raise HTTPException(422, f"{name!r} is no model of the zoo.")
        data = await image.read()
        found = []
        for name in (first, second):
            classifier = models.classifiers.get(name)
            if classifier:
                tensor = await workers.decode(tasks.loader(classifier), data)
                found.append(await workers.compute(tasks.timed_classify, name, classifier, tensor, top_k))
            else:
                found.append(tasks.facts(name))
        return Comparison(models=found)

    @router.post("/chat", response_model=Answer)
    async def chat(
        request: Request,
        image: Upload,
        question: Annotated[str, Form(min_length=1, max_length=2000)],
        keep: Annotated[float, Form(gt=0, le=1, description="Share of the visual tokens that is kept.")] = 1.0,
        turns: Annotated[
            str, Form(max_length=20_000, description="Earlier [question, answer] pairs about this picture, as JSON.")
        ] = "[]",
        max_new_tokens: Annotated[int, Form(ge=1, le=512, description="Of the answer, at most.")] = 128,
        stream: Annotated[
            bool, Form(description='Lines of JSON: {"text"} for each piece, then the document, or {"error"}.')
        ] = False,
    ) -> Any:
        """Ask about a picture."""
        model = _served(models, "chat", models.chat)
        earlier = _turns(turns)
        picture = await workers.decode(tasks.load_picture, await image.read())
        stopped, deadline = Event(), request.scope[DEADLINE] - HASTE

        def ask(say: Callable[[str], None]) -> Answer:
            reply = model.ask(
                picture,
                earlier,
                question,
                keep=keep,
                max_new_tokens=max_new_tokens,
                say=say,
                stop=lambda: stopped.is_set() or time.monotonic() > deadline,
            )
            return tasks.answer(reply)

        if stream:
            return StreamingResponse(_lines(workers, ask, stopped), media_type="application/x-ndjson")
        try:
            return await workers.talk(lambda: ask(lambda text: None))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            stopped.set()

    app.include_router(router)

    @app.api_route("/api/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(request: Request, rest: str) -> None:
        """Before the page, for Gradio has routes of such names."""
        raise HTTPException(404, f"There is nothing at this address for {request.method}.")


def _served(models: Models, task: str, model: Served | None) -> Served:
    if model is None:
        raise HTTPException(501, f"{task} is not served here: {models.missing.get(task, 'it was left out.')}")
    return model


def _turns(text: str) -> list[tuple[str, str]]:
    try:
        pairs = [(question, answer) for question, answer in json.loads(text)]
        if not all(isinstance(part, str) for pair in pairs for part in pair):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise HTTPException(422, "turns is no JSON list of [question, answer] pairs of texts.") from None
    return pairs


async def _lines(
    workers: Workers, ask: Callable[[Callable[[str], None]], Answer], stopped: Event
) -> AsyncIterator[str]:
    """What is said as it is said, then the whole, each as a line of JSON."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    answering = asyncio.ensure_future(
        workers.talk(lambda: ask(lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text)))
    )
    answering.add_done_callback(lambda done: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield json.dumps({"text": piece}) + "\n"
        yield answering.result().model_dump_json() + "\n"
    except ValueError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    except Exception:
        log.exception("an answer failed")
        yield json.dumps({"error": "The server failed at this answer; its log says why."}) + "\n"
    finally:
        stopped.set()
        answering.cancel()
