"""An ASGI application without a framework, for `portway asgi examples.asgi_app:app` and for its tests.

    GET /            who answered: pid and generation, and from whom the request came
    GET /slow?0.5    the same after half a second
    GET /big?1000    with so many bytes of padding
    POST /           the length of the body besides
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import portway


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http":
        await answer(scope, receive, send)
    elif scope["type"] == "websocket":
        await echo(receive, send)


async def lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"].endswith("/slow"):
        await asyncio.sleep(float(scope["query_string"] or 0.5))
    about = {
        "pid": os.getpid(), "generation": portway.generation().number, "client": scope["client"], "body": length,
        "server": scope["server"], "scheme": scope["scheme"], "root_path": scope["root_path"], "path": scope["path"],
    }  # fmt: skip
    if scope["path"].endswith("/big"):
        about["padding"] = "x" * int(scope["query_string"])
    body = json.dumps(about).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": message.get("text") or ""})
