"""backfeedr inside a Django project, under the prefix /crashes. Here, this file is the whole project.

    pip install django
    python examples/embed_django.py --port 8080
    python examples/client.py --endpoint http://127.0.0.1:8080/crashes --key bf_live_... crash examples/crash.json

In your project, `make_app` goes into wsgi.py. Django cannot mount a WSGI app, so
`embed.make_app` wraps the project.
"""

import embed  # the file beside this one
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path


def hello(request):
    return HttpResponse("Hello\n", content_type="text/plain; charset=utf-8")


urlpatterns = [path("", hello)]


def make_app(server):
    """Makes the project and puts `server`, a Backfeedr, in front of it."""
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "localhost"])
    return embed.make_app(server, get_wsgi_application())


if __name__ == "__main__":
    embed.main(make_app=make_app)
