"""Files of repositories on the Hugging Face hub, kept in its cache; errors that say what to do.

Not here: which of a repository's files is meant (``source.py``).
"""

from collections.abc import Callable
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path
from typing import TypeVar

from gemloom.errors import SourceError
from gemloom.files.names import cleaned

_T = TypeVar("_T")


def download(name: str, repo: str, file: str) -> str:
    """The path of a file in the cache, fetched if it is not there. SourceError about ``name``."""
    import huggingface_hub

    return _ask(name, lambda: huggingface_hub.hf_hub_download(repo, file))


def files(name: str, repo: str) -> list[str]:
    """Names of a repository's files; offline, of those in the cache. SourceError about ``name``."""
    return _ask(name, lambda: _files(repo))


def _files(repo: str) -> list[str]:
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        return huggingface_hub.list_repo_files(repo)
    root = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _ask(name: str, question: Callable[[], _T]) -> _T:
    """The hub's answer. Raises SourceError with one line that says what to do."""
    try:
        return question()
    except Exception as error:  # errors of whichever HTTP library the hub package uses come through
        reason = _reason(error)
    raise SourceError(f"{name}: {reason}")  # not "from": its text may quote the token


def _reason(error: BaseException) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(error, errors.LocalEntryNotFoundError):
        if HF_HUB_OFFLINE:
            return "not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download"
        error = error.__cause__ or error
    for kind, reason in (
        (errors.GatedRepoError, "gated; accept its terms on its page, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such repository, or private; for that set HF_TOKEN"),
        (errors.EntryNotFoundError, "no such file in the repository"),
    ):
        if isinstance(error, kind):
            return reason
    return _network_reason(error)


def _network_reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub refuses the token; set HF_TOKEN to a valid one, or unset it"
    if status is not None:
        return f"the hub answered with HTTP status {status}; try again later"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EACCES, EROFS):
        return f"{error.filename or 'the cache'}: {error.strerror}"
    lines = cleaned(str(error)).strip().splitlines() or [""]
    return (
        f"no answer from the hub ({type(error).__name__}: {lines[0][:200]}); "
        "check the network, or set HF_HUB_OFFLINE=1 to use the cache alone"
    )
