"""The project's own MLflow database: where it is, its lock, and its places after the project was moved."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import make_url

from pipeline.project import locked, root
from pudnet.errors import UserError

PLACES = (  # the columns of MLflow's database with the places of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def tracking_uri() -> str:
    """The address at MLFLOW_TRACKING_URI, or else the project's sqlite database."""
    database = str(root() / "mlflow.db")
    if "%" in database or "?" in database:  # quote slashes too, or MLflow would make folders of the quoted path
        database = quote(database, safe="")
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{database}")


def _database(uri: str) -> Path | None:
    """The file of a sqlite database; None for any other address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(make_url(uri).database or "")


@contextlib.contextmanager
def database_locked(uri: str) -> Iterator[Path | None]:
    """Lock a sqlite database, since several processes must not create it at once. Yields its path."""
    path = _database(uri)
    if path is None or not path.parent.is_dir():
        yield path
        return
    with locked(path.with_name(f"{path.name}.lock"), wait=True):
        yield path


def follow_move(uri: str) -> None:
    """Correct the artifacts' places in the database of a project that was moved or copied.

    MLflow stores absolute paths and has no call to change them (mlflow#3144). Without this, a moved project would
    write artifacts to its old folder, and a copy into the original. Only the project's own database is changed.
    """
    project, database = root(), _database(uri)
    if database is None or database.parent.resolve() != project or database.name != "mlflow.db":
        return
    if not database.is_file():
        return
    with locked(database.with_name(f"{database.name}.lock"), wait=True):
        try:
            with contextlib.closing(sqlite3.connect(database)) as connection, connection:
                _put_artifacts_at(connection, project / "mlartifacts")
        except sqlite3.DatabaseError as error:  # a damaged database is reported when it is written to
            if "locked" in str(error):
                raise UserError(
                    f"{database}: another process holds it, so its paths cannot be corrected for the project's new "
                    "place; stop that process"
                ) from None


def _put_artifacts_at(connection: sqlite3.Connection, folder: Path) -> None:
    """Point every artifact path in another folder of the same name to `folder`; keep paths that a user chose."""
    rows = connection.execute("SELECT artifact_location FROM experiments WHERE name LIKE 'pudnet-%'")
    folders = {place.rpartition("/")[0] for (place,) in rows if place}
    for old in sorted(folders - {folder.as_uri(), str(folder)}):
        if not old.endswith(f"/{folder.name}"):
            continue
        for table, column in PLACES:
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            connection.execute(moved, (folder.as_uri(), len(old) + 1, len(old) + 1, f"{old}/"))
