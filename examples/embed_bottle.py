"""backfeedr inside another bottle app, under the prefix /crashes.

    python examples/embed_bottle.py --port 8080
    python examples/client.py --endpoint http://127.0.0.1:8080/crashes --key bf_live_... crash examples/crash.json
"""

import bottle
import embed  # the file beside this one


def make_app(server):
    """Makes the host app and mounts `server`, a Backfeedr, in it."""
    host = bottle.Bottle()
    host.mount("/crashes/", server)

    @host.get("/crashes")
    def add_slash():
        bottle.redirect("crashes/", 308)

    @host.get("/")
    def hello():
        return "Hello\n"

    return host


if __name__ == "__main__":
    embed.main(make_app=make_app)
