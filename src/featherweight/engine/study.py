"""Where a search's study lives: a journal of ours, or a database that Optuna knows, by its URL.

The database has what the journal has, a row for each trial that was told, so other programs can watch the
search. One process works on a study.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from featherweight.engine.store import machine_mark
from featherweight.errors import OutputError

_HELD = "held"  # the study's attribute that tells who works on it
_KINDS = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"


def is_url(text: str) -> bool:
    """Whether this is an address of a database and no path."""
    return re.match(r"[\w+]+://", text) is not None


def shown(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url.partition("@")[2] or url


def database(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage in a database; its tables are made where they are missing.

    Raises:
        OutputError: The URL is none, its driver is missing, or the database does not answer.
    """
    if not is_url(url):
        raise OutputError(f"'{url}' is no address of a database", fix=f"--study {_KINDS}")
    try:
        return optuna.storages.RDBStorage(url)
    except ImportError as error:
        raise OutputError(
            f"the database '{shown(url)}' needs a driver: {error}",
            fix="pip install psycopg2-binary" if url.startswith("postgres") else "install it with pip",
        ) from error
    except (SQLAlchemyError, RuntimeError) as error:
        first = (str(getattr(error, "orig", None) or error).strip().splitlines() or [""])[0][:200]
        raise OutputError(
            f"the database '{shown(url)}' cannot be used: {first}", fix=f"check the address: {_KINDS}"
        ) from error


def forget(storage: optuna.storages.BaseStorage, name: str) -> None:
    """Remove a study, so that a search begins anew; one that is not there is no matter.

    Raises:
        OutputError: Another process of this machine works on it.
    """
    with suppress(KeyError):
        _check_free(optuna.load_study(study_name=name, storage=storage))
        optuna.delete_study(study_name=name, storage=storage)


def hold(study: optuna.Study) -> None:
    """Say that this process works on a study.

    Raises:
        OutputError: Another process of this machine does.
    """
    _check_free(study)
    holder = {"machine": machine_mark(), "process": os.getpid(), "since": time.time()}
    study.set_user_attr(_HELD, holder)


def release(study: optuna.Study) -> None:
    """Say that it does no more."""
    study.set_user_attr(_HELD, None)


def _check_free(study: optuna.Study) -> None:
    holder = study.user_attrs.get(_HELD)
    if not holder or holder["machine"] != machine_mark() or holder["process"] == os.getpid():
        return
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(holder["process"], 0)  # asks only
        raise OutputError(
            f"another process ({holder['process']}) is searching with this study",
            fix="wait until it has ended, or name another database",
        )


class _Held(JournalFileSymlinkLock):
    """The process holds the whole journal (:func:`hold_journal`), so single writes need no lock of their own.

    Optuna's own lock would outlive a killed process and stop the next one for half a minute.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def hold_journal(path: Path) -> IO[bytes]:
    """Lock the journal until it is closed or the process dies, and cut off a line torn by a kill."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutputError(
            f"another process is searching with the journal '{path}'", fix="wait until it has ended"
        ) from error
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return file


def backend(path: Path) -> JournalFileBackend:
    """What Optuna writes a held journal with."""
    return JournalFileBackend(str(path), lock_obj=_Held(str(path)))
