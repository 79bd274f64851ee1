"""The interactive API documentation at /docs, without files from other hosts.

FastAPI's own page loads Swagger UI from a CDN. Here its files come from `static/`, so that the page
works offline and no browser is sent to another host.
"""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse

DOCS_PATH = "/docs"
_STATIC = Path(__file__).parent / "static"
STATIC_FILES = {
    f"/docs-static/{name}": _STATIC / name
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
}


def add_docs_page(app: FastAPI) -> None:
    """Add /docs and its static files to an application that was made with `docs_url=None`."""

    @app.get(DOCS_PATH, include_in_schema=False)
    async def docs() -> HTMLResponse:
        script, style, icon = STATIC_FILES
        return get_swagger_ui_html(
            openapi_url=app.openapi_url or "",
            title=f"{app.title} API",
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
        )

    for url, path in STATIC_FILES.items():
        app.add_api_route(url, _file_endpoint(path), include_in_schema=False)


def _file_endpoint(path: Path) -> Callable[[], FileResponse]:
    def send_file() -> FileResponse:
        return FileResponse(path)

    return send_file
