"""backfeedr inside another WSGI app, under the prefix /crashes.

    python examples/embed.py --port 8080
    python examples/client.py --endpoint http://127.0.0.1:8080/crashes --key bf_live_... crash examples/crash.json

Copy `make_app`. For host apps in a framework, see embed_bottle.py, embed_flask.py and
embed_django.py, which use `main` below to serve.
"""

import argparse
import socket
import sys
from pathlib import Path
from urllib.parse import quote
from wsgiref.util import shift_path_info

import waitress

try:
    import backfeedr
except ImportError:  # in a fresh clone it is in the parent folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import backfeedr


def hello(environ, start_response):
    """The host app, which knows nothing about backfeedr."""
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [b"Hello\n"]


def make_app(server, host=hello):
    """Makes a WSGI app that passes requests under /crashes/ to `server`, a Backfeedr, and others to the host app."""
    def app(environ, start_response):
        path = environ.get("PATH_INFO", "")
        if path.startswith("/crashes/"):
            shift_path_info(environ)  # moves "/crashes" from PATH_INFO to SCRIPT_NAME
            return server(environ, start_response)
        if path == "/crashes":  # typed without the slash
            location = quote(environ.get("SCRIPT_NAME", "")) + "/crashes/"
            start_response("308 Permanent Redirect", [("Location", location), ("Content-Type", "text/plain")])
            return []
        return host(environ, start_response)
    return app


def main(argv=None, make_app=make_app):
    """Serves until it is interrupted; after an error, prints one line and exits with 1."""
    parser = argparse.ArgumentParser(description="Serves an app with backfeedr under /crashes.")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080; 0 takes a free one")
    parser.add_argument("--db", metavar="FILE", default="embedded.db", help="the database (default: embedded.db)")
    arguments = parser.parse_args(argv)
    try:
        with socket.create_server(("127.0.0.1", arguments.port)) as listener:
            serve(listener, arguments.db, make_app)
    except (backfeedr.SettingsError, backfeedr.StoreError, backfeedr.Refusal, OSError, OverflowError) as error:
        sys.exit(f"embed: {error}")


def serve(listener, db_path, make_app):
    """Serves on a listening socket. The text of a first start has the address with the prefix."""
    port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    print(f"embed on {url}\nbackfeedr on {url}/crashes\n", flush=True)
    with backfeedr.Backfeedr(
            db_path=db_path, host="127.0.0.1", port=port,
            announce=lambda text: print(text.replace(url, url + "/crashes"), end="", flush=True)) as server:
        waitress.serve(make_app(server), sockets=[listener])


if __name__ == "__main__":
    main()
