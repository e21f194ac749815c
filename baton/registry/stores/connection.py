"""How an object store is reached: settings from the environment, and what went wrong in words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from baton.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

INSTALL = "object stores need obstore and boto3: pip install 'baton[s3]'"
RETRIES = 5
"""A request that the store or the network failed is repeated this often, at growing intervals: a few seconds in all."""
REQUEST_TIMEOUT_S = 300
"""For one request with its body: a part of 16 MiB, four at a time, on a line of 2 Mbit/s."""
CONNECT_TIMEOUT_S = 10

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE after `aws configure` or `aws sso login`",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or sign in with AZURE_CLIENT_ID and its kin",
}
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist", "container does not exist")
_BAD_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthenticationFailed")
_WRONG_REGION = ("AuthorizationHeaderMalformed", "PermanentRedirect", "301 Moved", "IllegalLocationConstraint")
_UNREACHABLE = ("error sending request", "dns error", "timed out", "operation timed out")

_first_process: int | None = None


class Connection:
    """The handles for one URL, obstore's and (for multipart uploads to S3) boto3's, and their errors for people."""

    def __init__(self, url: str) -> None:
        """url: `s3://bucket/prefix`, `gs://…` or `az://…`; nothing is sent yet."""
        parts = urlsplit(url)
        if not parts.netloc or parts.query or parts.fragment or parts.username:
            raise UserError(f"{url} is no place for a registry: expected {parts.scheme}://bucket/prefix.")
        self.url, self.scheme, self.bucket = url, parts.scheme, parts.netloc
        self.prefix = parts.path.strip("/")
        self._objects = self._open()

    @property
    def objects(self) -> "ObjectStore":
        """The obstore handle. Raises RuntimeError in a forked process, where every call would wait for ever."""
        global _first_process
        if _first_process is None:
            _first_process = os.getpid()
        if _first_process != os.getpid():
            raise RuntimeError(
                f"{self.url} cannot be used in a process forked from one that used an object store: "
                "start it by spawn (multiprocessing.get_context('spawn'))."
            )
        return self._objects

    def key(self, path: str) -> str:
        """The object's key in its bucket."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def _open(self) -> Any:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise UserError(f"{self.url}: {INSTALL}.") from error
        # Without TLS only to a store on this very machine, as in tests, unless it is asked for.
        is_plain = endpoint_host() in _LOOPBACK or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
        options: Any = {
            "allow_http": is_plain,
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        }
        retries: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(minutes=3)}
        own: dict[str, Any] = {}
        if self.scheme == "s3":
            own = {"config": {"disable_bulk_delete": True}}  # not every S3-like store has it
            if not (os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE")):
                own |= self._profile()
        try:
            return from_url(self.url, client_options=options, retry_config=retries, **own)
        except (BaseError, ValueError) as error:
            raise UserError(f"{self.url} cannot be opened: {_brief(error)}. {_CREDENTIALS[self.scheme]}.") from error

    def _profile(self) -> dict[str, Any]:
        """Credentials and region of profiles, single sign-on, containers or instances, as AWS's tools find them."""
        try:
            import boto3
            from botocore.exceptions import BotoCoreError
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError as error:
            raise UserError(f"{self.url}: {INSTALL}.") from error
        try:
            session = boto3.Session()
            if session.get_credentials() is None:
                raise UserError(f"there are no credentials for {self.url}. {_CREDENTIALS['s3']}.")
            found = {"credential_provider": Boto3CredentialProvider(session)}
            return found if _region() or not session.region_name else found | {"region": session.region_name}
        except BotoCoreError as error:
            raise UserError(f"the credentials for {self.url} cannot be read: {error}. {_CREDENTIALS['s3']}.") from error

    @cached_property
    def s3(self) -> Any:
        """A boto3 client: obstore does not say the id of a multipart upload, without which none can be resumed."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise UserError(f"{self.url}: {INSTALL}.") from error
        settings = Config(
            retries={"mode": "standard", "max_attempts": RETRIES},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=REQUEST_TIMEOUT_S,
            # The very same place as obstore's, which reads no endpoint from a profile; stores other than Amazon's
            # seldom have a host name for every bucket.
            ignore_configured_endpoint_urls=True,
            s3={"addressing_style": "path" if _endpoint() else "auto"},
        )
        return boto3.Session().client("s3", region_name=_region(), endpoint_url=_endpoint(), config=settings)

    @contextmanager
    def errors(self, path: str) -> Iterator[None]:
        """Turn obstore's errors into FileNotFoundError or a UserError that names the object."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise self.explained(error, path) from error

    @contextmanager
    def s3_errors(self, path: str) -> Iterator[None]:
        """The same for boto3's errors."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise self.explained(error, path) from error

    def explained(self, error: Exception, path: str) -> Exception:
        """The exception to raise for one of obstore's or boto3's: FileNotFoundError or UserError."""
        from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

        text, what = str(error), f"{self.url}/{path}"
        if any(word in text for word in _NO_BUCKET):
            return UserError(f"there is no bucket {self.bucket!r} for {self.url}. Make it first, or mend the URL.")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(what)
        if isinstance(error, UnauthenticatedError) or any(word in text for word in _BAD_KEYS):
            return UserError(
                f"{self.url} does not know these credentials ({_brief(error)}). {_CREDENTIALS[self.scheme]}."
            )
        if isinstance(error, PermissionDeniedError) or "AccessDenied" in text:
            return UserError(
                f"{self.url} denies access to {what} ({_brief(error)}). Reading a registry needs permission to get "
                "and list objects, writing to put and delete them as well. Ask the bucket's owner, or use other "
                "credentials."
            )
        if any(word in text for word in _WRONG_REGION):
            return UserError(f"{self.url} lies in another region ({_brief(error)}). Set AWS_REGION to it.")
        if "instance metadata" in text or "169.254.169.254" in text or "metadata.google" in text:
            return UserError(f"there are no credentials for {self.url} ({_brief(error)}). {_CREDENTIALS[self.scheme]}.")
        if any(word in text for word in _UNREACHABLE) or "EndpointConnection" in type(error).__name__:
            at = endpoint_host() if self.scheme == "s3" else None
            return UserError(
                f"{self.url} cannot be reached{f' at {at}' if at else ''} ({_brief(error)}). Look at the network"
                f"{', AWS_ENDPOINT_URL and AWS_REGION' if self.scheme == 's3' else ''}, and try again."
            )
        return UserError(f"{what} failed: {_brief(error)}.")


def endpoint_host() -> str | None:
    """The host of the S3 endpoint that the environment names, if any."""
    named = _endpoint()
    return urlsplit(named).hostname if named else None


def _endpoint() -> str | None:
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in variables if os.environ.get(name)), None)


def _region() -> str | None:
    # boto3 by itself reads only the second.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _brief(error: Exception) -> str:
    """What matters of an error in one line; obstore adds its whole internal state."""
    text = str(error).partition("\n\nDebug source:")[0]
    return " ".join(text.split())[:400].rstrip(" .")
