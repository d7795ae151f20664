"""Who may do what: users, their tokens' roles, private and gated repositories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .store import HubError, Repo


@dataclass
class User:
    """The owner of a token, and what that token allows.

    kind: "access_token", or "oauth" for what a Space gets when its user signs in.
    role: "read", "write" or "fineGrained". A fine-grained token allows only what `scoped` lists, in
    the shape of the Hub's whoami, and `global_permissions` (such as "discussion.write"):
    `scoped=[{"entity": {"type": "org", "name": "org", "_id": "1"}, "permissions": ["repo.write"]}]`
    """

    name: str
    orgs: Sequence[str] = ()
    role: str = "write"
    kind: str = "access_token"
    scoped: list[dict[str, Any]] = field(default_factory=list)
    global_permissions: list[str] = field(default_factory=list)
    can_read_gated: bool = True  # fine-grained only

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "canReadGatedRepos": self.can_read_gated,
                "global": self.global_permissions,
                "scoped": self.scoped,
            }
        access = {"type": "access_token", "accessToken": token}
        return {
            "type": "user",
            "id": f"user-{self.name}",
            "name": self.name,
            "fullname": self.name,
            "orgs": [
                {"type": "org", "id": f"org-{name}", "name": name, "roleInOrg": "write"}
                for name in self.orgs
            ],
            "auth": {"type": "oauth"} if self.kind == "oauth" else access,
        }

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def may_read_private(self, repo_id: str) -> bool:
        return self._may(repo_id, "repo.content.read", "repo.write", roles=("read", "write"))

    def may_write(self, repo_id: str) -> bool:
        """Whether the token may create or change this repository (or any, given a namespace)."""
        return self._may(repo_id, "repo.write", roles=("write",))

    def may_propose(self, repo_id: str) -> bool:
        """Whether the token may open a pull request, which needs no right on the namespace."""
        if self.role == "fineGrained":
            granted = self._granted(repo_id, "repo.write", "discussion.write")
            return granted or "discussion.write" in self.global_permissions
        return self.role == "write"

    def _may(self, repo_id: str, *permissions: str, roles: Sequence[str]) -> bool:
        if not self.belongs_to(repo_id.partition("/")[0]):
            return False
        return self.role in roles or self._granted(repo_id, *permissions)

    def _granted(self, repo_id: str, *permissions: str) -> bool:
        names = (repo_id, repo_id.partition("/")[0])
        return self.role == "fineGrained" and any(
            scope["entity"]["name"] in names
            and not set(permissions).isdisjoint(scope["permissions"])
            for scope in self.scoped
        )


def check_visible(user: User | None, repo_id: str, repo: Repo | None) -> Repo:
    """The repository; one that is private and one that is missing look the same from outside."""
    if repo is not None and not (repo.private and not (user and user.may_read_private(repo_id))):
        return repo
    if user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    raise HubError(404, "Repository not found", "RepoNotFound")


def check_gate(user: User | None, repo: Repo) -> None:
    """File contents of a gated repository are for its owners and the users let in."""
    if not repo.gated:
        return
    if user is None:
        message = f"Access to model {repo.id} is restricted. You must have access to it and be"
        raise HubError(401, f"{message} authenticated to access it. Please log in.", "GatedRepo")
    if not user.belongs_to(repo.namespace) and user.name not in repo.allowed:
        message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
        raise HubError(403, f"{message} Visit the model's page to ask for access.", "GatedRepo")
    if user.role == "fineGrained" and not user.can_read_gated:
        message = "Please enable access to public gated repositories in your fine-grained token"
        raise HubError(403, f"{message} settings to view this repository.", "GatedRepo")


def check_write(user: User | None, repo_id: str) -> User:
    """The user, if the token may write there; `repo_id` may be a bare namespace."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user.may_write(repo_id):
        return user
    if user.role == "read":
        raise HubError(403, "You must use a write token to upload to a repository")
    raise HubError(403, f"This token gives no right to create or change {repo_id}")


def check_propose(user: User | None, repo_id: str) -> User:
    """The user, if the token may open pull requests there."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if not user.may_propose(repo_id):
        raise HubError(403, "You must use a write token to open a pull request")
    return user
