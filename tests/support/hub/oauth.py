"""Sign-in by OpenID Connect, as a Space asks for it; who signs in is `hub.signing_in`."""

from __future__ import annotations

import secrets
import time
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlencode

from .routing import Call, Routes
from .store import HubError
from .wire import Response

CLIENT, SECRET = "a-space", "a-space's secret"
SCOPES = "openid profile read-repos manage-repos"

routes = Routes()
_asked: dict[str, tuple[str, str]] = {}  # token and nonce by code


def environment(endpoint: str) -> dict[str, str]:
    """Variables that a Space with `hf_oauth: true` gets."""
    return {
        "OAUTH_CLIENT_ID": CLIENT, "OAUTH_CLIENT_SECRET": SECRET, "OAUTH_SCOPES": SCOPES,
        "OPENID_PROVIDER_URL": endpoint,
    }  # fmt: skip


@cache
def key() -> Any:
    """The key that identity tokens are signed with."""
    from joserfc.jwk import RSAKey

    return RSAKey.generate_key(2048, {"kid": "1", "use": "sig", "alg": "RS256"})


@routes("GET", "/.well-known/openid-configuration")
def configuration(call: Call) -> Response:
    at = call.hub.endpoint
    return Response.of_json({
        "issuer": at, "authorization_endpoint": f"{at}/oauth/authorize",
        "token_endpoint": f"{at}/oauth/token", "jwks_uri": f"{at}/oauth/jwks",
        "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
    })  # fmt: skip


@routes("GET", "/oauth/authorize")
def authorize(call: Call) -> Response:
    """Where the browser is sent: the one who signs in agrees at once."""
    asked = {name: values[0] for name, values in call.query.items()}
    if asked["client_id"] != CLIENT or asked["scope"] != SCOPES:
        raise HubError(400, "Not the client that is known, or not its scopes")
    code = secrets.token_hex(8)
    _asked[code] = (call.hub.signing_in, asked["nonce"])
    back = f"{asked['redirect_uri']}&{urlencode({'code': code, 'state': asked['state']})}"
    return Response(303, headers={"Location": back})


@routes("POST", "/oauth/token")
def token(call: Call) -> Response:
    from joserfc import jwt

    given = {name: values[0] for name, values in parse_qs(call.body.decode()).items()}
    access, nonce = _asked.pop(given["code"])
    name, now = call.hub.users[access].name, int(time.time())
    profile = {
        "sub": f"user-{name}", "name": name.title(), "preferred_username": name,
        "profile": f"{call.hub.endpoint}/{name}", "picture": f"{call.hub.endpoint}/{name}.png",
    }  # fmt: skip
    own = {"iss": call.hub.endpoint, "aud": CLIENT, "nonce": nonce, "iat": now, "exp": now + 3600}
    signed = jwt.encode({"alg": "RS256", "kid": "1"}, {**profile, **own}, key())
    return Response.of_json({
        "access_token": access, "token_type": "bearer", "expires_in": 3600, "scope": SCOPES,
        "id_token": signed,
    })  # fmt: skip


@routes("GET", "/oauth/jwks")
def keys(call: Call) -> Response:
    return Response.of_json({"keys": [key().as_dict(private=False)]})
