"""fastmcp's InMemoryOAuthProvider, which the Python original builds on, in front of a trivial handler."""

import asyncio
import json
import os
import resource
import socket
import sys

import uvicorn
from fastmcp.server.auth.providers.in_memory import InMemoryOAuthProvider
from mcp.server.auth.provider import AuthorizationParams
from mcp.server.auth.settings import ClientRegistrationOptions
from mcp.shared.auth import OAuthClientInformationFull
from pydantic import AnyUrl
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

ISSUER = "http://localhost:8050"
REDIRECT = AnyUrl("https://claude.ai/api/mcp/auth_callback")
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"

provider = InMemoryOAuthProvider(
    base_url=ISSUER, client_registration_options=ClientRegistrationOptions(enabled=True)
)
client = OAuthClientInformationFull(
    client_id="client",
    redirect_uris=[REDIRECT],
    token_endpoint_auth_method="none",
    grant_types=["authorization_code", "refresh_token"],
    response_types=["code"],
)


async def hello(request):
    if not request.user.is_authenticated:
        return PlainTextResponse("unauthorized", status_code=401)
    return PlainTextResponse("hello")


async def code():
    params = AuthorizationParams(
        state="state",
        scopes=[],
        code_challenge=CHALLENGE,
        redirect_uri=REDIRECT,
        redirect_uri_provided_explicitly=True,
    )
    await provider.authorize(client, params)
    return {"client_id": "client", "code": list(provider.auth_codes)[-1]}


def usage():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": used.ru_utime + used.ru_stime}


async def main():
    await provider.register_client(client)
    app = Starlette(
        routes=[*provider.get_routes(mcp_path="/mcp"), Route("/mcp", hello, methods=["GET", "POST"])],
        middleware=provider.get_middleware(),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        answer = usage() if line == '"usage"' else {"codes": [await code() for _ in range(int(line))]}
        print(json.dumps(answer), flush=True)
    serving.cancel()
    os._exit(0)


asyncio.run(main())
