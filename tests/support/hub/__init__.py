"""A small Hugging Face Hub on 127.0.0.1, for tests that run the real huggingface_hub client.

    hub = Hub()
    hub.start()  # HF_ENDPOINT=hub.endpoint, before the client is imported
    sha = hub.add_repo("org/model", {"config.json": "{}", "model.safetensors": Path("big")})
    hub.fail(r"model\\.safetensors", status=503)  # the next such request fails
    ...
    assert hub.sent(r"model\\.safetensors") < 1_000_000
    assert hub.files("me/result")["README.md"].startswith(b"---")

Nothing here imports huggingface_hub, which reads HF_ENDPOINT only once, when it is imported.
"""

from .access import User
from .hub import Hub
from .store import Blob, Commit, PullRequest, Repo
from .wire import Request
from .xet import Storage

__all__ = ["Blob", "Commit", "Hub", "PullRequest", "Repo", "Request", "Storage", "User"]
