"""A model repository on the Hugging Face Hub: what it holds, by digest, and its errors as a person can mend them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from baton.errors import UserError
from baton.registry.stores.files import CHUNK_BYTES, file_sha256


class Listed(NamedTuple):
    """A file as the Hub lists it: the sha256 of a large one, the git blob id of one that lies in git itself."""

    size: int
    sha256: str | None
    blob_id: str


class HubRepository:
    """One model repository; the endpoint and the token come from HF_ENDPOINT, HF_TOKEN and the usual places."""

    def __init__(self, repo_id: str) -> None:
        """repo_id: `org/name`; raises UserError when it cannot be one."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(f"{repo_id!r} is not a repository's name; expected org/name. {error}") from error
        if repo_id.count("/") != 1:
            raise UserError(f"{repo_id!r} is not a repository's name; expected org/name, as in hf://org/name.")
        self.api = HfApi(library_name="baton")
        self.repo_id = repo_id

    @property
    def url(self) -> str:
        """Where people find it."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def head(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means; None when there is no such repository (for this token)."""
        info = self._info(revision)
        return None if info is None else str(info.sha)

    def is_private(self) -> bool:
        """Whether only its owners see it."""
        return bool(getattr(self._info(None), "private", False))

    def _info(self, revision: str | None) -> Any:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self.errors(revision):
            try:
                return self.api.model_info(self.repo_id, revision=revision)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

    def create(self, private: bool) -> None:
        """Make it, unless it is there."""
        with self.errors():
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def files(self, commit: str) -> dict[str, Listed]:
        """Every file at a commit, by path."""
        from huggingface_hub.hf_api import RepoFile

        found = {}
        with self.errors(commit):
            for entry in self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True):
                if isinstance(entry, RepoFile):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found[entry.path] = Listed(entry.lfs.size if entry.lfs else entry.size, sha256, entry.blob_id)
        return found

    def download(self, path: str, commit: str, listed: Listed, folder: Path) -> None:
        """Fetch one file to `folder`/`path`, and check it against the digest that the Hub lists."""
        with self.errors(commit):
            file = self.api.hf_hub_download(self.repo_id, path, revision=commit, local_dir=folder)
        assert Path(file).is_relative_to(folder), file
        if problem := difference(Path(file), listed):
            raise UserError(f"{path} of {self.url} at {commit} arrived damaged: {problem}. Pull again.")

    @contextmanager
    def errors(self, revision: str | None = None) -> Iterator[None]:
        """Turn what the Hub and the network answer into UserErrors."""
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise UserError(f"{self.url} cannot be reached: HF_HUB_OFFLINE=1 is set. Unset it.") from error
        except errors.GatedRepoError as error:
            raise UserError(f"{self.url} is gated: ask for access on its page, and set HF_TOKEN.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(self.absent()) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{self.url} has no revision {revision!r}. Name a branch, a tag or a commit that its page lists."
            ) from error
        except errors.HfHubHTTPError as error:
            raise UserError(self._http_message(error)) from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
            raise UserError(f"{self.url} cannot be reached ({error}). Check the network, and HF_ENDPOINT.") from error
        except (RuntimeError, ValueError) as error:
            # the client wraps what happened in an upload's thread, and says in a ValueError what it finds malformed
            cause = error.__cause__
            if isinstance(cause, errors.HfHubHTTPError):
                raise UserError(self._http_message(cause)) from error
            raise UserError(f"{self.url}: {error}") from error

    def absent(self) -> str:
        """The message for a repository that is not there, or not for this token."""
        return (
            f"there is no model repository {self.repo_id} at {self.api.endpoint}, or your token may not see it "
            "(the Hub does not say which). Check the name, and set HF_TOKEN or run `hf auth login`."
        )

    def _http_message(self, error: Any) -> str:
        status = getattr(error.response, "status_code", None)
        if status == 412:
            return (
                f"{self.url} has changed while this was prepared: somebody else committed. Nothing was pushed. Look at "
                "what they did, and push again."
            )
        if status in (401, 403):
            return (
                f"your token may not do this at {self.url} (HTTP {status}). Set HF_TOKEN to one with write access to "
                f"{self.repo_id.split('/')[0]}, or ask its owners."
            )
        what = getattr(error, "server_message", None) or error
        return f"{self.url} answered HTTP {status}: {what}. Nothing was changed here; try again later."


def difference(file: Path, listed: Listed) -> str | None:
    """How a local file differs from a listed one, in words; None when it is the same."""
    if file.stat().st_size != listed.size:
        return f"{file.stat().st_size} bytes, the Hub lists {listed.size}"
    if listed.sha256 is not None:
        found, expected = file_sha256(file), listed.sha256
        return None if found == expected else f"sha256:{found}, the Hub lists sha256:{expected}"
    found = _git_blob_id(file)
    return None if found == listed.blob_id else f"git blob {found}, the Hub lists {listed.blob_id}"


def _git_blob_id(file: Path) -> str:
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode())  # git's own name for a file, no protection
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
