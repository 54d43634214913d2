"""backfeedr inside a Flask app, under the prefix /crashes.

    pip install flask
    python examples/embed_flask.py --port 8080
    python examples/client.py --endpoint http://127.0.0.1:8080/crashes --key bf_live_... crash examples/crash.json
"""

import embed  # the file beside this one
import flask
import werkzeug.utils
from werkzeug.middleware.dispatcher import DispatcherMiddleware


def make_app(server):
    """Makes the host app and mounts `server`, a Backfeedr, in it."""
    host = flask.Flask(__name__)

    def mounted(environ, start_response):
        app = server if environ["PATH_INFO"] else werkzeug.utils.redirect(environ["SCRIPT_NAME"] + "/", 308)
        return app(environ, start_response)

    # Mounted outside Flask, so that its hooks, sessions and error pages do not touch the reports.
    host.wsgi_app = DispatcherMiddleware(host.wsgi_app, {"/crashes": mounted})

    @host.get("/")
    def hello():
        return "Hello\n"

    return host


if __name__ == "__main__":
    embed.main(make_app=make_app)
