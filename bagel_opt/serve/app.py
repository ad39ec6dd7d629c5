"""The HTTP application: routes, errors, the page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from bagel_opt import __version__
from bagel_opt.serve import errors
from bagel_opt.serve.access import Access
from bagel_opt.serve.answers import ERRORS, ModelCard, ModelList
from bagel_opt.serve.bodies import add_schemas
from bagel_opt.serve.chat_bodies import ChatBody
from bagel_opt.serve.image_bodies import ImageBody, JsonEditBody
from bagel_opt.serve.middleware import Gate
from bagel_opt.serve.page_options import page_options
from bagel_opt.serve.response_bodies import ResponsesBody
from bagel_opt.serve.routes import chat, images, responses, videos
from bagel_opt.serve.service import Injected, Service
from bagel_opt.serve.video_bodies import VideoBody

PAGE = Path(__file__).parent / "page"
# The page needs nothing from elsewhere, and nobody may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(service: Service, access: Access = Access()) -> FastAPI:  # noqa: B008  frozen
    """The application of one model. When it shuts down it finishes what runs and closes the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if service.videos:
            service.videos.close(service.engine)
        await asyncio.to_thread(service.close)

    app = FastAPI(title="bagel_opt", version=__version__, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    errors.install(app)
    app.add_middleware(Gate, service=service, access=access)
    if access.origins:
        headers = {"allow_headers": ["*"], "expose_headers": ["x-request-id", "retry-after"]}
        settings = {"allow_methods": ["GET", "POST", "DELETE"], "allow_private_network": True, **headers}
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, **settings)
    app.include_router(images.router)
    app.include_router(chat.router)
    app.include_router(responses.router)
    app.include_router(videos.router)

    @app.get("/v1/models", responses=ERRORS)
    async def models(service: Injected) -> ModelList:
        """The model that is served, once for each of its names."""
        return ModelList(data=[_card(service, name) for name in service.names])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str, service: Injected) -> ModelCard:
        return _card(service, service.check_model(model))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready", responses={503: {"description": "The device failed repeatedly, or pictures from clients are stuck."}}
    )
    async def ready(service: Injected) -> Response:
        """The engine serves requests."""
        status = service.status()
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(service: Injected) -> Response:
        return Response(generate_latest(service.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/options.json", include_in_schema=False)
    async def options(service: Injected) -> JSONResponse:
        model = service.engine.model
        return JSONResponse(page_options(service.limits, model.defaults, model.config.without), headers=PAGE_HEADERS)

    @app.head("/pictures/{name}", include_in_schema=False)
    @app.get("/pictures/{name}", include_in_schema=False)
    async def linked(name: str, service: Injected) -> Response:
        data = service.links and service.links.get(name)
        if not data:
            raise errors.ApiError(
                404, "there is no such picture; its address holds for an hour, and not for ever", "name"
            )
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        return Response(data, media_type=f"image/{name.rpartition('.')[2]}", headers=headers)

    @app.get("/examples.json", include_in_schema=False)
    async def examples(service: Injected) -> JSONResponse:
        found = service.engine.model.examples
        told = {"prompts": found.prompts, "edit": found.edit, "question": found.question}
        return JSONResponse(told | {"picture": found.picture is not None}, headers=PAGE_HEADERS)

    @app.get("/example.png", include_in_schema=False)
    async def example(service: Injected) -> Response:
        picture = service.engine.model.examples.picture
        if picture is None:
            raise errors.ApiError(404, "this model has no example picture")
        return Response(picture, media_type="image/png", headers=PAGE_HEADERS)

    add_schemas(app, ImageBody, JsonEditBody, ChatBody, ResponsesBody, VideoBody)
    for file in sorted(PAGE.glob("*")):
        _serve_file(app, f"/{'' if file.name == 'index.html' else file.name}", file)
    return app


def _card(service: Service, name: str) -> ModelCard:
    config = service.engine.model.config
    adapters = [*(service.engine.model.runtime.adapters or ())]
    about = {"adapters": adapters, "draws": list(config.draws), "thinks": "think" not in config.without}
    return ModelCard(id=name, default_size=config.default_size, size_multiple=config.token_pixels, **about)


def _serve_file(app: FastAPI, path: str, file: Path) -> None:
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(file, headers=PAGE_HEADERS)
