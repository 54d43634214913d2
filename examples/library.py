"""backfeedr from plain Python, without a web server: makes a key, and prints the figures of an app.

    python examples/library.py
    python examples/library.py --db backfeedr.db --app Shop

This works while a server uses the same file.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    from backfeedr import Metrics, StorageUnavailable, Store, StoreError
except ImportError:  # in a fresh clone it is in the parent folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from backfeedr import Metrics, StorageUnavailable, Store, StoreError


def key_and_figures(db_path, app):
    """Makes a key for an app, and returns it with the figures of the last seven days. Makes the app if needed."""
    # A Backfeedr would also make the app `default` and an admin token in a new database, which only a server needs.
    with Store(db_path) as store:
        # create_key refuses unknown names, so that a misspelt name does not make a second app.
        exists = app in [known.name for known in store.apps()]
        key = store.create_key(app) if exists else store.create_app(app)
        return key, Metrics(store).overview(app)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes a key for an app, and prints the app's last seven days.")
    parser.add_argument("--db", metavar="FILE", default="library.db", help="the database (default: library.db)")
    parser.add_argument("--app", metavar="NAME", default="Shop", help="default: Shop")
    arguments = parser.parse_args(argv)
    try:
        key, figures = key_and_figures(arguments.db, arguments.app)
    except (StoreError, StorageUnavailable) as error:  # the second one if the file is locked
        sys.exit(f"library: {error}")
    print(key)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
