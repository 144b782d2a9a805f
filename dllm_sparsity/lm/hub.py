"""What the hub of models says: whether it is there, whether a model can be had, and in two lines why not."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from dllm_sparsity.errors import UserError

FETCH = "dllm-sparsity fetch CONFIG"
"""As messages have it; the command line, which knows the study's file, puts its name in."""
FETCH_FIRST = f"with a network, first: {FETCH}"
_PATIENCE_SECONDS, _VALID_SECONDS = 5, 60
_answers: dict[str, tuple[bool, float]] = {}
"""By address of a hub: whether it answered, and when; not every model waits for it anew."""


def check_exists(model: str, revision: str | None = None) -> None:
    """Refuse a model that cannot be had, before any weight is read.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: It is no folder with a config.json, and the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model} holds no config.json", "give a folder made by save_pretrained, or a hub id")
        return
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"no such folder: {model}", "check the path; a model on the hub has an id such as org/name")
    try:
        hf_hub_download(model, "config.json", revision=revision, local_files_only=not is_hub_there(model, revision))
    except HFValidationError as error:
        raise UserError(f"{model!r} is neither a folder nor a hub id", "ids look like org/name") from error
    except (HfHubHTTPError, OSError) as error:
        raise hub_error(model, revision, error) from error


def is_hub_there(model: str, revision: str | None) -> bool:
    """Tell whether the hub answers at all; a download that cannot reach it tries for half a minute.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the hub.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub import errors as hub

    if _is_offline():
        return False
    answered, when = _answers.get(constants.ENDPOINT, (False, -math.inf))
    if time.monotonic() - when < _VALID_SECONDS:
        return answered
    try:
        url = hf_hub_url(model, "config.json", revision=revision)
    except hub.HFValidationError:  # a folder, whose code may be on the hub, or no id at all
        url = constants.ENDPOINT
    try:
        get_hf_file_metadata(url, timeout=_PATIENCE_SECONDS)
        answered = True
    except hub.HfHubHTTPError:
        answered = True
    except Exception:  # the errors of whatever library the hub's client speaks through
        answered = False
    _answers[constants.ENDPOINT] = answered, time.monotonic()
    return answered


def why_no_hub() -> str | None:
    """Return why the hub was not asked: it is offline, or did not answer; None where it may be asked."""
    from huggingface_hub import constants

    if _is_offline():
        return "the hub is not asked offline"
    return None if _answers.get(constants.ENDPOINT, (True, 0))[0] else "the hub was not reached"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1"


def hub_error(model: str, revision: str | None, error: Exception) -> UserError:
    """Return in two lines why the hub does not give a model.

    Args:
        model: Hub id.
        revision: Branch, tag or commit that was asked for.
        error: What the hub's library raised.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    cause = error.__cause__
    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(cause, hub.HfHubHTTPError):
        error = cause  # the hub did answer; that the file is not here either is no news
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.GatedRepoError):
        page = f"{constants.ENDPOINT}/{model}"
        if status == 403 or (status != 401 and get_token()):
            return UserError(f"{model} is gated, and your account may not read it", f"accept its terms at {page}")
        return UserError(
            f"{model} is gated, and you are not logged in", f"hf auth login, then accept its terms at {page}"
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        why = "log in with an account that may read it" if get_token() else "a private one needs: hf auth login"
        return UserError(f"no model {model!r} on the hub", f"check the id; {why}")
    if isinstance(error, hub.RevisionNotFoundError):
        return UserError(f"{model} has no revision {revision!r}", "look at its branches and tags on the hub")
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return UserError(f"{model} holds no config.json on the hub", "give a model in the format of transformers")
    if status in (401, 403):
        return UserError(f"the hub refuses your token for {model}", "make a new one that may read it: hf auth login")
    if status is not None:
        return UserError(f"the hub answered {status} when asked for {model}", "try again later, or give a local folder")
    if _is_offline():
        return UserError(
            f"model {model!r} is not on this machine and HF_HUB_OFFLINE is set",
            f"give a local folder, or {FETCH_FIRST}",
        )
    return UserError(
        f"model {model!r} is not on this machine and the hub cannot be reached", "give a local folder, or go online"
    )


def no_safetensors(model: str) -> UserError:
    """Return in two lines that a model's weights are none that are loaded.

    Args:
        model: Hub id or folder.
    """
    return UserError(
        f"{model} has no safetensors weights; pickles are never loaded",
        "convert it: load and save_pretrained it once, and give the folder",
    )
